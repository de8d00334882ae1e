"""The plan of a run: parameters, memory, communication, bubble and operations of its ranks."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megalm.config.recompute import RecomputeConfig
from megalm.config.sections import RunConfig
from megalm.models.families import FAMILIES
from megalm.planner.activations import StageBytes, stage_bytes
from megalm.planner.communication import sent_bytes
from megalm.planner.layout import Layout, optimizer_state_sizes, parameter_sizes
from megalm.planner.memory import SIZES, RankMemory, state_bytes, step_bytes
from megalm.planner.schedule import SimulatedStep, StepTimes, action_table, parts, simulate

MODES = ("none", "selective", "full")
"""Recompute granularities, in the order of falling memory."""


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """One rank of a pipeline stage; all ranks of the stage are alike."""

    layers: tuple[int, ...]
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
    known: KnownPasses = {}
    ranks = [_plan_rank(layout, rank, actions, modes, known) for rank, actions in enumerate(table)]
    sent = sent_bytes(layout, max(rank.parameters for rank in ranks))
    rows = config.model.padded_vocab_size(layout.mesh.tp)
    family = FAMILIES[config.model.model_family]
    flops = family.training_flops_per_token(config.model, config.batch.seq_length, rows)
    return Plan(layout=layout, ranks=ranks, sent=sent, step=step, flops_per_token=flops)


StageShapes = tuple[tuple[bool, bool, tuple[Hashable, ...]], ...]
"""Of each stage of a rank: has it the embedding, has it the head, the kinds of its layers."""
KnownPasses = dict[tuple[str, StageShapes], list[StageBytes]]
"""Passes that have been measured, by recompute granularity: ranks in the middle of a pipeline are often alike."""


def _plan_rank(
    layout: Layout, pp_rank: int, actions: Sequence[Any], modes: tuple[str, ...], known: KnownPasses
) -> RankPlan:
    stages_here = layout.stages(pp_rank)
    sizes, optimizer_sizes = parameter_sizes(stages_here), optimizer_state_sizes(stages_here, layout.config.optimizer)
    state = state_bytes(layout.config, sizes, sum(optimizer_sizes), layout.mesh.dp, layout.micro_batches)
    state = replace(state, remembered=_remembered_bytes(layout, len(layout.layers(pp_rank))))
    split = any(kind == "I" for action in actions for kind, _, _ in parts(action))
    stages = layout.pipeline.stages(pp_rank)
    shapes = tuple((stage.is_first, stage.is_last, layout.layer_kinds(stage)) for stage in stages_here)
    memory = {}
    for mode in modes:
        if (mode, shapes) not in known:
            recompute = _recompute(layout.config.recompute, mode)
            known[mode, shapes] = stage_bytes(
                layout.fake_rank(pp_rank, recompute, state.keep, state.pass_bucket), split
            )
        passes = dict(zip(stages, known[mode, shapes], strict=True))
        memory[mode] = RankMemory(state=state, step=step_bytes(actions, passes))
    return RankPlan(layers=layout.layers(pp_rank), parameters=sum(sizes), memory=memory)


def _remembered_bytes(layout: Layout, layers: int) -> int:
    """What so many layers remember of all rows that a rank trains."""
    shape = layout.memory_shape
    return (
        0 if shape is None else layers * layout.micro_batches * math.prod(shape) * SIZES[layout.config.precision.dtype]
    )


def _recompute(config: RecomputeConfig, mode: str) -> RecomputeConfig:
    """The run's own settings for its own granularity, else the defaults of another one."""
    if mode == (config.recompute_granularity or "none"):
        return config
    return RecomputeConfig.model_validate({"recompute_granularity": None if mode == "none" else mode})
