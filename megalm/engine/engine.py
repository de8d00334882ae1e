"""One training step and one evaluation step on the DeepSpeed engine.

Shapes: B micro-batch size, T sequence length.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalm.distributed.fingerprint import of_slices
from megalm.distributed.groups import MeshGroups, RankGroup
from megalm.distributed.shards import ShardSpec, StateSlice
from megalm.engine import live_weights, state
from megalm.engine.batch_memory import BatchMemory
from megalm.engine.deepspeed_patches import grow_scale_after_step
from megalm.engine.host_memory import FreedMemory
from megalm.engine.loss_sums import LossSums, losses_of_kinds, means, total, weighted
from megalm.engine.master_weights import MasterWeights
from megalm.engine.runner import Runner
from megalm.errors import NonFiniteError
from megalm.models.contract import Batch


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step over a global batch gave."""

    loss: float
    """Weighted sum of `losses`."""
    losses: dict[str, float]
    """Each named loss: mean over what it counts of the global batch ("lm": over its unmasked tokens, nats)."""
    counts: dict[str, float]
    """What each is the mean over ("lm": unmasked tokens of the global batch)."""
    grad_norm: float
    """L2 norm of the averaged gradient before clipping."""
    loss_scale: float
    """Loss scale of this step; 1 without fp16."""
    skipped: bool
    """The gradients were not finite; weights and moments are as before."""
    losses_of: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    """`loss` of each kind of samples that is told apart; None for one that counts nothing in this batch."""


@dataclass(kw_only=True, eq=False)
class Engine:
    """A model under DeepSpeed: train_step, eval_step, and its state as named slices."""

    ds_engine: Any
    zero_stage: int
    runner: Runner
    names: dict[nn.Parameter, str]
    """This rank's parameters."""
    shard_specs: Mapping[str, ShardSpec]
    """Of every parameter of the whole model: which part of it is here."""
    device: torch.device
    groups: MeshGroups
    freed_memory: FreedMemory
    state_kinds: state.StateKinds
    """What the optimizer keeps of each parameter."""
    memory: BatchMemory | None = None
    """What rows of the batch go on from, with segment recurrence."""
    kinds: dict[str, int] = field(default_factory=dict)
    """Kinds of samples whose losses training steps also give: field of the batch (int64 [B]) -> number of kinds."""
    evaluated_kinds: dict[str, int] = field(default_factory=dict)
    """The same of evaluations."""
    scalars: state.OptimizerScalars = field(init=False)
    """What a checkpoint holds of the optimizer besides tensors."""
    _grow_scale: Callable[[bool], None] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.scalars = state.OptimizerScalars(self.ds_engine, self.zero_stage)
        if self.zero_stage and self.ds_engine.fp16_enabled():
            self._grow_scale = grow_scale_after_step(self.ds_engine.optimizer.loss_scaler)

    def tell_apart(self, field: str, number: int, *, evaluated: bool = False) -> None:
        """From now on training steps also give the losses of so many kinds of samples ("dataset_id", ...).

        With `evaluated` evaluations do, too.
        """
        self.kinds[field] = number
        if evaluated:
            self.evaluated_kinds[field] = number

    def train_step(
        self,
        batches: Sequence[Batch],
        learning_rate: float,
        *,
        decoupled_lr: float | None = None,
        weight_decay: float | None = None,
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches of the global batch, as many as it has.

        `decoupled_lr` is the rate of the groups that have one of their own, `weight_decay` that of the groups that
        decay; None: as the others, and as built.

        Each loss is sum of losses / sum of counts over all ranks and micro-batches, not a mean of means.

        Phases: count, accumulate gradients, sum the losses, update.
        """
        ds_engine, weights = self.ds_engine, self.runner.loss_weights
        ds_engine.train()
        self._accumulate(len(batches))
        for group in ds_engine.basic_optimizer.param_groups:
            own = group.get("decoupled", False) and decoupled_lr is not None
            group["lr"] = decoupled_lr if own else learning_rate
            if group.get("decays", False) and weight_decay is not None:
                group["weight_decay"] = weight_decay
        loss_scale, copies = self.loss_scale, self.groups.weights.size
        counts = self._counts(batches)
        # DeepSpeed averages gradients over the ranks with the same weights; the sum over them is wanted
        scales = {name: weight * copies / max(counts[name], 1.0) for name, weight in weights.items()}
        sums = self._loss_sums(self.kinds)
        self.runner.train(batches, scales, loss_scale, sums.add)
        totals = self._sum_over_ranks(sums.values)
        losses = means(totals[0, :, 0], counts)
        self._update()
        self.freed_memory.after_step()
        return StepResult(
            loss=weighted(losses, weights),
            losses=losses,
            counts=counts,
            grad_norm=float(ds_engine.get_global_grad_norm()),
            loss_scale=loss_scale,
            skipped=not ds_engine.was_step_applied(),
            losses_of={kind: losses_of_kinds(sums.of_kind(totals, kind), weights) for kind in self.kinds},
        )

    def _accumulate(self, micro_batches: int) -> None:
        """Tell DeepSpeed of how many micro-batches this step is; with offload its optimizer goes by it as well."""
        ds_engine = self.ds_engine
        if micro_batches == ds_engine.gradient_accumulation_steps():
            return
        micro_batch_size = ds_engine.train_micro_batch_size_per_gpu()
        ds_engine.set_train_batch_size(micro_batches * micro_batch_size * ds_engine.dp_world_size)
        if self.zero_stage > 0:
            ds_engine.optimizer.gradient_accumulation_steps = micro_batches

    def _counts(self, batches: Sequence[Batch]) -> dict[str, float]:
        """The denominator of each loss, over the micro-batches of all ranks with the same weights.

        As the losses: a rank counts what its own part of the sequences holds, and all ranks of a pipeline the same.
        """
        names = tuple(self.runner.loss_weights)
        own = [self.runner.counts(batch) for batch in batches]
        values = torch.stack([torch.stack([total(counts[name]) for name in names]) for counts in own]).sum(0)
        _all_reduce(values, self.groups.weights)
        return dict(zip(names, values.tolist(), strict=True))

    def _loss_sums(self, kinds: Mapping[str, int]) -> LossSums:
        return LossSums(tuple(self.runner.loss_weights), self.runner.counts, kinds, self.device)

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

    def eval_step(self, batches: Sequence[Batch]) -> Tensor:
        """This rank's `evaluation_sums` of these micro-batches: to add up for `mean_over_ranks`.

        Of a pipeline, only the last stage's rank has them; the others have zeros. With segment recurrence rows go on
        where those of the call before ended, from the beginning of an `evaluation` on.
        """
        self.ds_engine.eval()
        sums = self._loss_sums(self.evaluated_kinds)
        self.runner.evaluate(batches, sums.add)
        return sums.values

    def evaluation_sums(self) -> Tensor:
        """Sum and count of every loss, of all samples and of each kind that evaluations tell apart: zeros.

        float64 [2, number of losses, 1 + number of kinds].
        """
        return self._loss_sums(self.evaluated_kinds).values

    def evaluation(self) -> AbstractContextManager[None]:
        """Around the `eval_step`s of one data set; what training remembers is put aside meanwhile."""
        return nullcontext() if self.memory is None else self.memory.evaluation()

    def mean_over_ranks(self, sums: Tensor) -> dict[str, float]:
        """Every loss from every rank's sum of `eval_step` results; `sums` becomes that of all ranks."""
        totals, counts = self._sum_over_ranks(sums)[..., 0]
        return means(totals, dict(zip(self.runner.loss_weights, counts.tolist(), strict=True)))

    def mean_of_kinds(self, sums: Tensor) -> dict[str, tuple[float | None, ...]]:
        """The loss of each kind of samples, from all ranks' `sums`; None for one that counts nothing."""
        of, weights = self._loss_sums(self.evaluated_kinds), self.runner.loss_weights
        return {kind: losses_of_kinds(of.of_kind(sums, kind), weights) for kind in self.evaluated_kinds}

    def total_loss(self, losses: Mapping[str, float]) -> float:
        """The weighted sum of named losses."""
        return weighted(losses, self.runner.loss_weights)

    def next_logits(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, V), float32, of the token after each row of `tokens_BT`, without vocabulary padding.

        What comes after a token must not change them.
        """
        return self.logits_at({"tokens": tokens_BT}, [tokens_BT.shape[1] - 1])[:, 0]

    def logits_at(self, fields: Mapping[str, Tensor], places: Sequence[int]) -> Tensor:
        """Logits (B, places, V), float32, of a batch of these fields (B, length), without vocabulary padding.

        Every rank calls it with the same fields, at most a micro-batch of samples, and has the result. They may be
        padded: where the model would see that, `padding_mask` (B, T), bool, tells.
        """
        self.ds_engine.eval()
        return self.runner.logits_at(fields, places).float()

    def state_slices(self) -> list[StateSlice]:
        """The part of weights and moments that this rank keeps; empty moments are created as zeros."""
        return state.state_slices(self.ds_engine, self.zero_stage, self.names, self.shard_specs, self.state_kinds)

    @property
    def optimizer_name(self) -> str:
        """Class of the optimizer, and DeepSpeed's own around it, if any."""
        base, outer = self.ds_engine.basic_optimizer, self.ds_engine.optimizer
        if isinstance(base, MasterWeights):
            return type(base.base).__name__
        return f"{type(base).__name__} in DeepSpeed's {type(outer).__name__}"

    def owned_slices(self) -> list[StateSlice]:
        """The slices that this rank is to write: those that it counts; at stage 0, where all ranks with the same
        weights hold the same, every n-th of them.
        """
        slices, weights = [piece for piece in self.state_slices() if piece.shard_spec.is_owner], self.groups.weights
        return slices[weights.rank :: weights.size] if self.zero_stage == 0 else slices

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights that the model computes with."""
        return next(iter(self.names)).dtype

    def differing_from_written(self, written: Mapping[str, int]) -> list[str]:
        """The parameters that the model computes with otherwise than with the weights that are written of them.

        `written` are the fingerprints of what this rank has written of `owned_slices`. Every rank calls it.
        """
        owned = {parameter: name for parameter, name in self.names.items() if self.shard_specs[name].is_owner}
        return live_weights.differing(written, owned, self.shard_specs, self.groups.weights)

    def differing_from_state(self) -> list[str]:
        """The parameters that the model computes with otherwise than with the fp32 weights kept of them.

        Every rank calls it.
        """
        held = of_slices(((piece, piece.weight) for piece in self.state_slices()), self.dtype)
        ranks = self.groups.weights if self.zero_stage else None
        return live_weights.differing(held, self.names, self.shard_specs, ranks)

    def set_weight(self, parameter: nn.Parameter, part: Tensor) -> None:
        """Give the model its working copy of one parameter; `part` holds the fp32 elements of its shard_spec."""
        state.set_weight(parameter, self.shard_specs[self.names[parameter]], part)

    @property
    def loss_scale(self) -> float:
        """Current loss scale."""
        if self.zero_stage == 0:
            return float(self.ds_engine.optimizer.loss_scale)
        return float(self.ds_engine.optimizer.loss_scale) if self.ds_engine.fp16_enabled() else 1.0

    def parameters_norm(self) -> float:
        """L2 norm of all parameters (fp32 masters) of the whole model."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for piece in self.state_slices():
            if piece.shard_spec.is_owner:
                total += piece.weight.double().square().sum().to(self.device)
        if self.zero_stage > 0:
            _all_reduce(total, self.groups.weights)
        _all_reduce(total, self.groups.model_copy)
        return float(total.sqrt())

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        """Sum of `value`, of which every rank with the last stage has its samples' part, the others nothing."""
        _all_reduce(value, self.groups.weights)
        _all_reduce(value, self.groups.pipeline)
        return value


def _all_reduce(value: Tensor, ranks: RankGroup) -> None:
    """Sum `value` in place."""
    if ranks.size > 1:
        dist.all_reduce(value, group=ranks.group)
