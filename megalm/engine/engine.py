"""One training step and one evaluation step on the DeepSpeed engine.

Shapes: B micro-batch size, T sequence length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.distributed.groups import MeshGroups
from megalm.distributed.mesh import Axis
from megalm.distributed.shards import ShardSpec, StateSlice
from megalm.engine import state
from megalm.engine.deepspeed_patches import grow_scale_after_step
from megalm.engine.host_memory import FreedMemory
from megalm.engine.master_weights import MasterWeights
from megalm.engine.pipeline_gradients import Batch, PipelineSpec, StageGradients
from megalm.errors import NonFiniteError
from megalm.models.blocks.loss import DatasetSums, summed_loss, token_count


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
    dataset_losses: tuple[float | None, ...] = ()
    """Loss per unmasked token of each dataset of the blend; None for one without tokens in this batch."""


class Engine:
    """A model under DeepSpeed: train_step, eval_step, and its state as named slices."""

    def __init__(
        self,
        ds_engine: Any,
        stage: int,
        names: dict[nn.Parameter, str],
        shard_specs: Mapping[str, ShardSpec],
        device: torch.device,
        groups: MeshGroups,
        state_kinds: state.StateKinds,
        pipeline_spec: PipelineSpec | None = None,
        freed_memory: FreedMemory | None = None,
    ) -> None:
        self.ds_engine = ds_engine
        self.stage = stage
        self._pipeline = pipeline_spec.pipeline if pipeline_spec else None
        self._gradients = StageGradients(ds_engine, stage, pipeline_spec) if pipeline_spec else None
        self._grow_scale = (
            grow_scale_after_step(ds_engine.optimizer.loss_scaler) if stage and ds_engine.fp16_enabled() else None
        )
        self.names = names
        self.shard_specs = shard_specs
        self.device = device
        self.groups = groups
        self.state_kinds = state_kinds
        self._by_dataset: DatasetSums | None = None
        self._freed_memory = freed_memory or FreedMemory(False)

    def count_by_dataset(self, num_datasets: int) -> None:
        """From now on training steps also give the loss of each dataset; batches hold `dataset_id` [B] then."""
        self._by_dataset = DatasetSums(num_datasets, self.device)

    def train_step(self, micro_batches: Sequence[Batch], seeds: Sequence[int], learning_rate: float) -> StepResult:
        """One optimizer step over this rank's micro-batches of the global batch.

        The loss is sum of losses / number of tokens over all ranks and micro-batches, not a mean of means.
        `seeds` holds one seed per micro-batch for what the model draws (dropout).

        Phases: count tokens, accumulate gradients, sum the loss, update.
        """
        ds_engine = self.ds_engine
        ds_engine.train()
        for group in ds_engine.basic_optimizer.param_groups:
            group["lr"] = learning_rate
        scale = self.loss_scale
        tokens = self._sum_over_data(sum(token_count(batch["loss_mask"]) for batch in micro_batches))
        # DeepSpeed averages gradients over the dp axis; the sum over it is wanted
        grad_scale = self.groups.size(Axis.DP) / max(tokens, 1.0)
        loss_total, dataset_losses = self._loss_over_ranks(self._accumulate(micro_batches, seeds, grad_scale))
        self._update()
        self._freed_memory.after_step()
        return StepResult(
            loss=loss_total / max(tokens, 1.0),
            grad_norm=float(ds_engine.get_global_grad_norm()),
            tokens=int(tokens),
            loss_scale=scale,
            skipped=not ds_engine.was_step_applied(),
            dataset_losses=dataset_losses,
        )

    def _accumulate(self, micro_batches: Sequence[Batch], seeds: Sequence[int], grad_scale: float) -> Tensor:
        """Gradients of the losses x `grad_scale` of all micro-batches; the sum of the losses on this rank, float64."""
        ds_engine = self.ds_engine
        if self._pipeline is not None and self._gradients is not None:
            with self._gradients.collected() as collect:
                scaled = grad_scale * self.loss_scale
                return self._pipeline.train(micro_batches, seeds, scaled, collect, self._note_losses)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, (batch, seed) in enumerate(zip(micro_batches, seeds, strict=True), 1):
            ds_engine.set_gradient_accumulation_boundary(number == len(micro_batches))
            loss = self._summed_loss(batch, seed)
            loss_sum += loss.detach()
            loss = loss * grad_scale
            ds_engine.backward(loss * self.loss_scale if self.stage == 0 else loss, scale_wrt_gas=False)
            if number < len(micro_batches):
                ds_engine.step()
        return loss_sum

    def _loss_over_ranks(self, loss_sum: Tensor) -> tuple[float, tuple[float | None, ...]]:
        """The summed loss of all ranks, and the loss per token of each dataset, in one reduction."""
        if self._by_dataset is None:
            return float(self._sum_over_ranks(loss_sum)), ()
        sums = self._sum_over_ranks(torch.cat([loss_sum.view(1), self._by_dataset.take().flatten()]))
        losses, tokens = sums[1:].view(2, -1).tolist()
        means = tuple(loss / number if number else None for loss, number in zip(losses, tokens, strict=True))
        return float(sums[0]), means

    def _update(self) -> None:
        try:
            self.ds_engine.step()
            if self._grow_scale is not None and self.ds_engine.was_step_applied():
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
        """This rank's (sum of losses, number of unmasked tokens) as a float64 tensor of two.

        Of a pipeline, only the last stage's rank has them; the others have zeros.
        """
        self.ds_engine.eval()
        if self._pipeline is not None and self._gradients is not None:
            with self._gradients.parameters_at_hand():
                return self._pipeline.evaluate(micro_batches)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in micro_batches:
            sums += torch.stack([self._summed_loss(batch, None).double(), token_count(batch["loss_mask"])])
        return sums

    @torch.no_grad()
    def next_logits(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, V), float32, of the token after each row of `tokens_BT`, without vocabulary padding.

        Every rank calls it with the same tokens, at most a micro-batch of samples, and has the result.
        """
        self.ds_engine.eval()
        if self._pipeline is not None and self._gradients is not None:
            with self._gradients.parameters_at_hand():
                return self._pipeline.next_logits(tokens_BT).float()
        length, model = tokens_BT.shape[1], self.ds_engine.module
        # sequence parallelism needs equal parts; what comes after a token does not change its logits
        logits_BTV = self.ds_engine(F.pad(tokens_BT, (0, -length % self.groups.size(Axis.TP))))
        return logits_BTV[:, length - 1, : model.config.vocab_size].float()  # type: ignore[no-any-return]

    def mean_over_ranks(self, sums: Tensor) -> float:
        """Loss per token from every rank's sum of `eval_step` results."""
        total = self._sum_over_ranks(sums)
        return float(total[0] / total[1].clamp(min=1.0))

    def state_slices(self) -> list[StateSlice]:
        """The part of weights and moments that this rank keeps; empty moments are created as zeros."""
        return state.state_slices(self.ds_engine, self.stage, self.names, self.shard_specs, self.state_kinds)

    @property
    def optimizer_name(self) -> str:
        """Class of the optimizer, and DeepSpeed's own around it, if any."""
        base, outer = self.ds_engine.basic_optimizer, self.ds_engine.optimizer
        if isinstance(base, MasterWeights):
            return type(base.base).__name__
        return f"{type(base).__name__} in DeepSpeed's {type(outer).__name__}"

    def owned_slices(self) -> list[StateSlice]:
        """The slices that this rank is to write: those that it counts; at stage 0, where the dp axis holds the same,
        every n-th of them.
        """
        slices, groups = [piece for piece in self.state_slices() if piece.shard_spec.is_owner], self.groups
        return slices[groups.axis_rank(Axis.DP) :: groups.size(Axis.DP)] if self.stage == 0 else slices

    def scalar_state(self) -> dict[str, Any]:
        """The optimizer's state that is not a tensor: step count and loss scaler."""
        return state.scalar_state(self.ds_engine, self.stage)

    def load_scalar_state(self, values: dict[str, Any]) -> None:
        """Inverse of `scalar_state`."""
        state.load_scalar_state(self.ds_engine, self.stage, values)

    def set_weight(self, parameter: nn.Parameter, part: Tensor) -> None:
        """Give the model its working copy of one parameter; `part` holds the fp32 elements of its shard_spec."""
        state.set_weight(parameter, self.shard_specs[self.names[parameter]], part)

    @property
    def loss_scale(self) -> float:
        """Current loss scale."""
        if self.stage == 0:
            return float(self.ds_engine.optimizer.loss_scale)
        return float(self.ds_engine.optimizer.loss_scale) if self.ds_engine.fp16_enabled() else 1.0

    def parameters_norm(self) -> float:
        """L2 norm of all parameters (fp32 masters) of the whole model."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for piece in self.state_slices():
            if piece.shard_spec.is_owner:
                total += piece.weight.double().square().sum().to(self.device)
        if self.stage > 0:
            self._all_reduce(total)
        if dist.get_world_size(self.groups.model_parallel_group) > 1:
            dist.all_reduce(total, group=self.groups.model_parallel_group)
        return float(total.sqrt())

    def _summed_loss(self, batch: Batch, seed: int | None) -> Tensor:
        losses_BT = self.ds_engine(
            batch["tokens"],
            position_ids_BT=batch.get("position_ids"),
            labels_BT=batch["labels"],
            cu_seqlens_BN=batch.get("cu_seqlens"),
            dropout_seed=seed,
        )
        self._note_losses(losses_BT.detach(), batch)
        return summed_loss(losses_BT, batch["loss_mask"])

    def _note_losses(self, losses_BT: Tensor, batch: Batch) -> None:
        if self._by_dataset is not None and "dataset_id" in batch:
            self._by_dataset.add(losses_BT, batch["loss_mask"], batch["dataset_id"])

    def _sum_over_data(self, value: Tensor | int) -> float:
        total = torch.as_tensor(value, dtype=torch.float64, device=self.device)
        self._all_reduce(total)
        return float(total)

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        """Sum of `value`, which only ranks with the last stage have, over the axes along which it differs."""
        self._all_reduce(value)
        self._all_reduce(value, Axis.PP)
        return value

    def _all_reduce(self, value: Tensor, axis: Axis = Axis.DP) -> None:
        """Sum `value` in place over one axis."""
        if self.groups.size(axis) > 1:
            dist.all_reduce(value, group=self.groups.group(axis))
