"""One training step and one evaluation step on the DeepSpeed engine.

Shapes: B micro-batch size, T sequence length.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megalm.dist.groups import MeshGroups
from megalm.dist.mesh import Axis
from megalm.dist.slices import StateSlice
from megalm.engine import state
from megalm.engine.stage_gradients import StageGradients, is_copy
from megalm.errors import NonFiniteError
from megalm.models.loss import summed_loss, token_count

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step over a global batch gave."""

    loss: float
    """Mean over the unmasked tokens of the global batch, nats."""
    grad_norm: float
    """L2 norm of the averaged gradient before clipping."""
    tokens: int
    """Unmasked tokens of the global batch."""
    loss_scale: float
    """Loss scale of this step; 1 without fp16."""
    skipped: bool
    """The gradients were not finite; weights and moments are as before."""


class Pipeline(Protocol):
    """What takes micro-batches through a model whose stages stand on several ranks."""

    def train(
        self,
        micro_batches: Sequence[Batch],
        seeds: Sequence[int],
        factor: float,
        on_gradients: Callable[[Iterable[nn.Parameter]], None],
    ) -> Tensor:
        """Forward and backward of all; the sum of losses on the last stage, else 0. Gradients are times `factor`.

        `on_gradients` gets the parameters whose gradients of one micro-batch are complete.
        """

    def evaluate(self, micro_batches: Sequence[Batch]) -> Tensor:
        """(sum of losses, number of unmasked tokens), float64, on the last stage; else zeros."""


class Engine:
    """A model under DeepSpeed: train_step, eval_step, and its state as named slices.

    `names` are those of this rank's parameters, `shapes` those of the whole model's.
    """

    def __init__(
        self,
        wrapped: Any,
        stage: int,
        names: dict[nn.Parameter, str],
        shapes: dict[str, tuple[int, ...]],
        device: torch.device,
        groups: MeshGroups,
        pipeline: Pipeline | None = None,
        shared_over: ProcessGroup | None = None,
    ) -> None:
        self.wrapped = wrapped
        self.stage = stage
        self.shapes = shapes
        self._pipeline = pipeline
        self._gradients = StageGradients(wrapped, stage, shared_over) if pipeline is not None else None
        self._grow_scale = _grow_after_step(wrapped.optimizer.loss_scaler) if stage and wrapped.fp16_enabled() else None
        self.names = names
        self.device = device
        self.groups = groups

    def train_step(self, micro_batches: Sequence[Batch], seeds: Sequence[int], learning_rate: float) -> StepResult:
        """One optimizer step over this rank's micro-batches of the global batch.

        The loss is sum of losses / number of tokens over all ranks and micro-batches, not a mean of means.
        `seeds` holds one seed per micro-batch for what the model draws (dropout).

        Phases: count tokens, accumulate gradients, sum the loss, update.
        """
        wrapped = self.wrapped
        wrapped.train()
        for group in wrapped.basic_optimizer.param_groups:
            group["lr"] = learning_rate
        scale = self.loss_scale
        tokens = self._sum_over_data(sum(token_count(batch["loss_mask"]) for batch in micro_batches))
        # DeepSpeed averages gradients over the dp axis; the sum over it is wanted
        factor = self.groups.size(Axis.DP) / max(tokens, 1.0)
        loss_total = self._sum_over_pipeline(self._accumulate(micro_batches, seeds, factor))
        self._update()
        return StepResult(
            loss=loss_total / max(tokens, 1.0),
            grad_norm=float(wrapped.get_global_grad_norm()),
            tokens=int(tokens),
            loss_scale=scale,
            skipped=not wrapped.was_step_applied(),
        )

    def _accumulate(self, micro_batches: Sequence[Batch], seeds: Sequence[int], factor: float) -> Tensor:
        """Gradients of the losses x `factor` of all micro-batches; the sum of the losses on this rank, float64."""
        wrapped = self.wrapped
        if self._pipeline is not None and self._gradients is not None:
            with self._gradients.collected() as collect:
                return self._pipeline.train(micro_batches, seeds, factor * self.loss_scale, collect)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, (batch, seed) in enumerate(zip(micro_batches, seeds, strict=True), 1):
            wrapped.set_gradient_accumulation_boundary(number == len(micro_batches))
            loss = self._summed_loss(batch, seed)
            loss_sum += loss.detach()
            loss = loss * factor
            wrapped.backward(loss * self.loss_scale if self.stage == 0 else loss, scale_wrt_gas=False)
            if number < len(micro_batches):
                wrapped.step()
        return loss_sum

    def _update(self) -> None:
        try:
            self.wrapped.step()
            if self._grow_scale is not None and self.wrapped.was_step_applied():
                self._grow_scale(False)
        except Exception as error:
            if "scale already at minimum" not in str(error):
                raise
            raise NonFiniteError(
                "gradients overflow even at the smallest loss scale; lower --lr or --min-loss-scale, or train with "
                "--bf16"
            ) from error

    @torch.no_grad()
    def eval_step(self, micro_batches: Sequence[Batch]) -> Tensor:
        """This rank's (sum of losses, number of unmasked tokens) as a float64 tensor of two."""
        self.wrapped.eval()
        if self._pipeline is not None and self._gradients is not None:
            with self._gradients.parameters_at_hand():
                return self._pipeline.evaluate(micro_batches)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in micro_batches:
            sums += torch.stack([self._summed_loss(batch, None).double(), token_count(batch["loss_mask"])])
        return sums

    def mean_over_ranks(self, sums: Tensor) -> float:
        """Loss per token from every rank's sum of `eval_step` results."""
        self._all_reduce(sums, Axis.DP)
        self._all_reduce(sums, Axis.PP)
        return float(sums[0] / sums[1].clamp(min=1.0))

    def state_slices(self) -> list[StateSlice]:
        """The part of weights and moments that this rank keeps; empty moments are created as zeros."""
        return state.state_slices(self.wrapped, self.stage, self.names)

    @property
    def optimizer_name(self) -> str:
        """Class of the optimizer under DeepSpeed, and DeepSpeed's own around it."""
        base, outer = type(self.wrapped.basic_optimizer).__name__, type(self.wrapped.optimizer).__name__
        return base if base == outer else f"{base} in DeepSpeed's {outer}"

    def owned_slices(self) -> list[StateSlice]:
        """The slices that this rank is to write: at stage 0, where the dp axis holds the same, every n-th.

        A tied weight that stands on two stages is written by the first.
        """
        copies = {name for parameter, name in self.names.items() if is_copy(parameter)}
        slices, groups = [piece for piece in self.state_slices() if piece.name not in copies], self.groups
        return slices[groups.position(Axis.DP) :: groups.size(Axis.DP)] if self.stage == 0 else slices

    def scalar_state(self) -> dict[str, Any]:
        """The optimizer's state that is not a tensor: step count and loss scaler."""
        return state.scalar_state(self.wrapped, self.stage)

    def load_scalar_state(self, values: dict[str, Any]) -> None:
        """Inverse of `scalar_state`."""
        state.load_scalar_state(self.wrapped, self.stage, values)

    def set_weight(self, parameter: nn.Parameter, full: Tensor) -> None:
        """Give the model its working copy of one parameter; `full` is the whole fp32 tensor."""
        state.set_weight(parameter, full)

    @property
    def loss_scale(self) -> float:
        """Current loss scale."""
        if self.stage == 0:
            return float(self.wrapped.optimizer.loss_scale)
        return float(self.wrapped.optimizer.loss_scale) if self.wrapped.fp16_enabled() else 1.0

    def parameters_norm(self) -> float:
        """L2 norm of all parameters (fp32 masters)."""
        squares = [piece.weight.double().square().sum() for piece in self.owned_slices()]
        total = torch.stack(squares).sum().to(self.device) if squares else torch.zeros((), dtype=torch.float64)
        self._all_reduce(total, Axis.DP)
        self._all_reduce(total, Axis.PP)
        return float(total.sqrt())

    def _summed_loss(self, batch: Batch, seed: int | None) -> Tensor:
        losses_BT = self.wrapped(
            batch["tokens"],
            position_ids_BT=batch.get("position_ids"),
            labels_BT=batch["labels"],
            cu_seqlens_BN=batch.get("cu_seqlens"),
            dropout_seed=seed,
        )
        return summed_loss(losses_BT, batch["loss_mask"])

    def _sum_over_data(self, value: Tensor | int) -> float:
        total = torch.as_tensor(value, dtype=torch.float64, device=self.device)
        self._all_reduce(total, Axis.DP)
        return float(total)

    def _sum_over_pipeline(self, value: Tensor) -> float:
        """Sum over all ranks of what only the last stages hold."""
        self._all_reduce(value, Axis.DP)
        self._all_reduce(value, Axis.PP)
        return float(value)

    def _all_reduce(self, value: Tensor, axis: Axis) -> None:
        """Sum `value` in place over one axis."""
        if self.groups.size(axis) > 1:
            dist.all_reduce(value, group=self.groups.group(axis))


def _grow_after_step(scaler: Any) -> Callable[[bool], None]:
    """Make DeepSpeed's loss scaler leave the scale of a good step alone; returns what lets it grow afterwards.

    ZeRO 1 to 3 update the scale before they divide the gradients by it, so that each growth would halve a step.
    """
    update: Callable[[bool], None] = scaler.update_scale
    scaler.update_scale = lambda overflow: update(True) if overflow else None
    return update
