"""Next-token prediction (GPT): every position predicts the token after it.

Shapes: T sequence, N = T + 1 room for cumulative document lengths.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from megalm.config.sections import RunConfig
from megalm.errors import ConfigError
from megalm.objectives.base import Example, Field, Sample


@dataclass(frozen=True, kw_only=True)
class CausalObjective:
    """Turns tokens [T + 1] into the arrays of one batch row, each [T] unless another shape is said.

    `tokens` and `labels` (int64) and `loss_mask` (float32): no loss where the label is `pad`, and none where the input
    is `eod` with `eod_mask_loss`; padding is then replaced by id 0, which every embedding has. A document of the row
    ends with each `eod` among its inputs. With `reset_position_ids`, `position_ids` (int64) count from 0 in each
    document. With `reset_attention_mask`, `cu_seqlens` (int32 [N]) holds the cumulative lengths of the documents, from
    0 to T, the rest filled with T: attention stays inside them. All as Megatron-LM's GPTDataset, without its mask of
    T x T.

    Raises:
        ConfigError: an option that needs document ends, without an `eod`.
    """

    special_tokens: ClassVar[tuple[str, ...]] = ("eod",)
    shared_tokens: ClassVar[int] = 1

    eod: int | None = None
    eod_mask_loss: bool = False
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    pad: int = -1

    def __post_init__(self) -> None:
        for option in ("eod_mask_loss", "reset_position_ids", "reset_attention_mask"):
            if getattr(self, option) and self.eod is None:
                flag = "--" + option.replace("_", "-")
                raise ConfigError(f"{option} needs a tokenizer with an end-of-document token; drop {flag}")

    @classmethod
    def build(cls, config: RunConfig, special: Mapping[str, int | None]) -> Self:
        """The objective that the run's flags ask for."""
        data = config.data
        return cls(
            eod=special["eod"],
            eod_mask_loss=data.eod_mask_loss,
            reset_position_ids=data.reset_position_ids,
            reset_attention_mask=data.reset_attention_mask,
        )

    def sample_tokens(self, seq_length: int) -> int:
        """The input, and one token more: the last label."""
        return seq_length + 1

    def fields(self, seq_length: int) -> Mapping[str, Field]:
        """The fields of every example, in their order."""
        found = {
            "tokens": Field((seq_length,), np.int64),
            "labels": Field((seq_length,), np.int64),
            "loss_mask": Field((seq_length,), np.float32),
        }
        if self.reset_position_ids:
            found["position_ids"] = Field((seq_length,), np.int64)
        if self.reset_attention_mask:
            found["cu_seqlens"] = Field((seq_length + 1,), np.int32)
        return found

    def __call__(self, sample: Sample) -> Example:
        """The arrays of one batch row; `sample` is not changed, but `tokens` and `labels` may be views of it."""
        tokens, labels = sample.tokens[:-1], sample.tokens[1:]
        if sample.tokens[-1] == self.pad:  # padding is at the end
            loss_mask = (labels != self.pad).astype(np.float32)
            inputs, targets = np.where(tokens == self.pad, 0, tokens), np.where(labels == self.pad, 0, labels)
        else:
            loss_mask = np.ones(len(labels), dtype=np.float32)
            inputs, targets = tokens, labels  # views: the loader copies when it stacks rows
        if self.eod_mask_loss:
            loss_mask[tokens == self.eod] = 0.0
        row: Example = {
            "tokens": inputs,
            "labels": targets,
            "loss_mask": loss_mask,
        }
        if self.reset_position_ids or self.reset_attention_mask:
            assert self.eod is not None, "checked when the objective is built"
            starts = document_starts(tokens, self.eod)
            if self.reset_position_ids:
                lengths = np.diff(starts, append=len(tokens))
                row["position_ids"] = np.arange(len(tokens)) - np.repeat(starts, lengths)
            if self.reset_attention_mask:
                row["cu_seqlens"] = np.full(len(tokens) + 1, len(tokens), dtype=np.int32)
                row["cu_seqlens"][: len(starts)] = starts
        return row


def document_starts(tokens: npt.NDArray[np.int64], eod: int) -> npt.NDArray[np.int64]:
    """Where documents start in `tokens` [T], int64: at 0 and after each `eod` but one in the last place."""
    return np.concatenate([[0], np.flatnonzero(tokens[:-1] == eod) + 1])
