"""Next-token prediction (GPT): every position predicts the token after it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megalm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CausalObjective:
    """Turns tokens [seq_length + 1] into `tokens`, `labels` (int64) and `loss_mask` (float32), [seq_length] each.

    As Megatron-LM's GPTDataset: no loss where the label is `pad`, and none where the input is `eod` with
    `eod_mask_loss`; padding is then replaced by id 0, which every embedding has.

    Raises:
        ConfigError: `eod_mask_loss` without an `eod`.
    """

    eod: int | None = None
    eod_mask_loss: bool = False
    pad: int = -1

    def __post_init__(self) -> None:
        if self.eod_mask_loss and self.eod is None:
            raise ConfigError("eod_mask_loss needs a tokenizer with an end-of-document token; drop --eod-mask-loss")

    def __call__(self, sample: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.generic]]:
        """The arrays of one batch row; `sample` is not changed."""
        tokens, labels = sample[:-1], sample[1:]
        loss_mask = (labels != self.pad).astype(np.float32)
        if self.eod_mask_loss:
            loss_mask[tokens == self.eod] = 0.0
        return {
            "tokens": np.where(tokens == self.pad, 0, tokens),
            "labels": np.where(labels == self.pad, 0, labels),
            "loss_mask": loss_mask,
        }
