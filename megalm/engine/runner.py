"""How micro-batches get through a model: one face, whether the whole of it is here or its stages are on several ranks.

Shapes: B micro-batch size, T sequence length, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.data.batch import Batch as TensorBatch
from megalm.engine.batch_memory import BatchMemory
from megalm.models.blocks.loss import scaled_total
from megalm.models.contract import Batch, LanguageModel, Losses, OnLosses


class Runner(Protocol):
    """All that the engine knows of how its model runs."""

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """The losses, and what each weighs."""

    @property
    def stages(self) -> str:
        """Who holds what, in words; empty where every rank holds the whole model."""

    def counts(self, batch: Batch) -> Losses:
        """What the denominators of the losses are sums of."""

    def train(
        self, batches: Sequence[Batch], scales: Mapping[str, float], loss_scale: float, on_losses: OnLosses
    ) -> None:
        """Forward and backward of a step's micro-batches; ends with gradients that wait for the optimizer.

        They are those of: sum over losses of scale x loss, x `loss_scale`, mean over data-parallel ranks. `on_losses`
        gets the losses of each micro-batch on the ranks that have them: those with the end of the model.
        """

    def evaluate(self, batches: Sequence[Batch], on_losses: OnLosses) -> None:
        """Forward of micro-batches, without gradients."""

    def logits_at(self, fields: Mapping[str, Tensor], places: Sequence[int]) -> Tensor:
        """Logits (B, places, V) of a batch of these fields, without vocabulary padding, on every rank.

        Fields (B, length) may get zeros after their end: a model that would see them needs its `padding_mask`.
        """


class WholeModel:
    """The whole model on this rank: DeepSpeed's engine runs it, so that its hooks see every pass."""

    stages = ""

    def __init__(
        self, ds_engine: Any, zero_stage: int, length_multiple: int, memory: BatchMemory | None = None
    ) -> None:
        """`length_multiple`: sequences must have such a length; `memory`: what rows go on from."""
        self._ds_engine, self._zero_stage, self._length_multiple = ds_engine, zero_stage, length_multiple
        self._memory = memory
        self._model: LanguageModel = ds_engine.module

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """The losses, and what each weighs."""
        return self._model.loss_weights

    def counts(self, batch: Batch) -> Losses:
        """What the denominators of the losses are sums of."""
        return self._model.counts(batch)

    def train(
        self, batches: Sequence[Batch], scales: Mapping[str, float], loss_scale: float, on_losses: OnLosses
    ) -> None:
        """Micro-batch by micro-batch: forward, backward; the last one is where DeepSpeed's accumulation ends."""
        ds_engine = self._ds_engine
        for number, batch in enumerate(batches):
            is_last = number == len(batches) - 1
            ds_engine.set_gradient_accumulation_boundary(is_last)
            losses = ds_engine(batch, None if self._memory is None else self._memory.trained(number))
            on_losses({name: loss.detach() for name, loss in losses.items()}, batch)
            loss = scaled_total(losses, scales)
            # from stage 1 on, DeepSpeed's optimizer scales the loss itself
            ds_engine.backward(loss * loss_scale if self._zero_stage == 0 else loss, scale_wrt_gas=False)
            if not is_last:
                ds_engine.step()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], on_losses: OnLosses) -> None:
        """Micro-batch by micro-batch."""
        for number, batch in enumerate(batches):
            past = None if self._memory is None else self._memory.evaluated(number)
            on_losses(self._ds_engine(batch, past), batch)

    @torch.no_grad()
    def logits_at(self, fields: Mapping[str, Tensor], places: Sequence[int]) -> Tensor:
        """Logits (B, places, V); sequences are padded to lengths that sequence parallelism takes."""
        padded = {name: F.pad(field, (0, -field.shape[1] % self._length_multiple)) for name, field in fields.items()}
        logits_BTV: Tensor = self._ds_engine(TensorBatch(tensors=padded), wants_logits=True)
        return logits_BTV[:, list(places), : self._model.config.vocab_size]
