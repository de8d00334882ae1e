"""The plan of a run: parameters, memory, communication, bubble and operations of its ranks."""

from dataclasses import dataclass

import torch

from megalm.config import RunConfig
from megalm.config.recompute import RecomputeConfig
from megalm.kernels import library
from megalm.kernels.choice import FUSED, REFERENCE, Kernels
from megalm.models.flops import training_flops_per_token
from megalm.planner.activations import Part, activation_bytes
from megalm.planner.communication import sent_bytes
from megalm.planner.layout import Layout, parameters
from megalm.planner.memory import SIZES, RankMemory, state_bytes
from megalm.planner.schedule import SimulatedStep, StepTimes, action_table, simulate

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("none", "selective", "full")
"""Recompute granularities, in the order of falling memory."""


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """One rank of a pipeline stage; all ranks of the stage are alike."""

    part: Part
    parameters: int
    memory: dict[str, RankMemory]
    """By recompute granularity."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `megalm plan` says."""

    layout: Layout
    ranks: list[RankPlan]
    """By pipeline rank."""
    sent: dict[str, int]
    """Bytes a step by axis."""
    step: SimulatedStep
    flops_per_token: int

    @property
    def mode(self) -> str:
        """The run's own recompute granularity."""
        return self.layout.config.recompute.recompute_granularity or "none"

    @property
    def logits_bytes(self) -> int:
        """Logits of one micro-batch on a rank that holds the head."""
        batch = self.layout.config.batch
        size = SIZES[self.layout.config.precision.dtype]
        return batch.micro_size * batch.seq_length * self.layout.rows * size

    def peak(self, mode: str) -> int:
        """Bytes of the fullest rank under a recompute granularity."""
        return max(rank.memory[mode].peak for rank in self.ranks)


def make_plan(config: RunConfig, world_size: int, times: StepTimes, modes: tuple[str, ...] = MODES) -> Plan:
    """The plan of a complete configuration on `world_size` ranks.

    Memory is that of the kernels that a run on this machine would use (`kernels_backend`).

    Raises:
        PlatformError: kernels_backend=fused and they cannot be had here.
        LayoutError: the ranks, the model or the batch cannot be split so.
    """
    layout = Layout.of(config, world_size)
    schedule = layout.pipeline.schedule
    table = action_table(schedule, layout.mesh.pp, layout.chunks, layout.micro_batches, layout.stage_ranks)
    step = simulate(table, layout.stage_costs(), times, layout.chunks)
    kernels = FUSED if library.load(config.kernels.kernels_backend).fused else REFERENCE
    ranks = [_plan_rank(layout, rank, step.in_flight[rank], modes, kernels) for rank in range(layout.mesh.pp)]
    sent = sent_bytes(layout, max(rank.parameters for rank in ranks))
    rows = config.model.padded_vocab_size(layout.mesh.tp)
    flops = training_flops_per_token(config.model, config.batch.seq_length, rows)
    return Plan(layout=layout, ranks=ranks, sent=sent, step=step, flops_per_token=flops)


def _plan_rank(layout: Layout, pp_rank: int, in_flight: float, modes: tuple[str, ...], kernels: Kernels) -> RankPlan:
    config, part = layout.config, layout.part(pp_rank)
    number = parameters(part)
    state = state_bytes(config, number, layout.mesh.dp)
    dtype = _DTYPES[config.precision.dtype]
    wide = torch.float32 if config.precision.grad_accum_dtype == "fp32" else dtype
    memory = {}
    for mode in modes:
        activations = activation_bytes(
            part,
            _recompute(config.recompute, mode),
            kernels,
            micro_batch_size=config.batch.micro_size,
            seq_length=config.batch.seq_length,
            dtype=dtype,
            gradient_dtype=wide if state.gradients_at_parameters else None,
            micro_batches=layout.micro_batches,
        )
        memory[mode] = RankMemory(state=state, activations=activations, in_flight=in_flight)
    return RankPlan(part=part, parameters=number, memory=memory)


def _recompute(config: RecomputeConfig, mode: str) -> RecomputeConfig:
    """The run's own settings for its own granularity, else the defaults of another one."""
    if mode == (config.recompute_granularity or "none"):
        return config
    return RecomputeConfig.model_validate({"recompute_granularity": None if mode == "none" else mode})
