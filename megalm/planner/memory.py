"""What one rank holds at its fullest: weights, optimizer state, gradients, ZeRO's buffers, activations.

The rules of each ZeRO stage are those of DeepSpeed 0.19 and of megalm's stage 0, in bytes of real allocations; sources:
Rajbhandari et al. 2020, arXiv:1910.02054, section 3, and `deepspeed/runtime/zero`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megalm.config.deepspeed.write import engine_json, offloads_optimizer, zero_stage
from megalm.config.sections import RunConfig
from megalm.planner.activations import KeepGradients, StageBytes
from megalm.planner.schedule import parts

ENGINE_BUCKET = 500_000_000
"""Elements that DeepSpeed lays flat at a time to reduce gradients outside of ZeRO."""
MAX_LIVE = 1_000_000_000
"""Default of stage3_max_live_parameters: gathered weights that stage 3 keeps before it lets go of any."""
PERSISTENT, PREFETCHED = 100_000, 50_000_000
"""Defaults of stage3_param_persistence_threshold and stage3_prefetch_bucket_size."""
SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """What a rank holds all the time, and what it needs more at each moment of a step."""

    weights: int
    master: int
    moments: int
    gradients: int
    """Gradient buffers that stand all the time."""
    remembered: int = 0
    """What the rows of the batch remember of the samples before (segment recurrence)."""
    gathered: int = 0
    """Weights of other ranks, gathered for use (ZeRO 3)."""
    fetched: int = 0
    """The flat buffer in which weights come ahead of their use; it stays until the last of them is used (ZeRO 3)."""
    pass_bucket: int = 0
    """Buffers in which gradients are reduced during a backward pass (then the passes count them) ..."""
    end_bucket: int = 0
    """... or in pipelines after it."""
    update: int = 0
    """Gradients and their copies at the end of the step."""
    keep: KeepGradients = "no"
    """How long gradients stay with the parameters; while they do, `StepBytes` counts them."""

    @property
    def gradients_at_end(self) -> int:
        """Gradients and their copies, buffers that stand all the time included."""
        return self.gradients + self.update

    @property
    def standing(self) -> int:
        """Bytes that are there at every moment."""
        return self.weights + self.master + self.moments + self.gradients + self.remembered


@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """The most that the passes of one rank take in a step, beyond weights and optimizer state."""

    saved: int
    """Activations kept for backward passes."""
    forward: int
    """During a forward pass."""
    backward: int
    """During a backward pass."""
    collected: int
    """After a backward pass, when its gradients are taken."""


def step_bytes(actions: Sequence[Any], stages: Mapping[int, StageBytes]) -> StepBytes:
    """Walk through the actions of one rank, each with what other micro-batches hold at its time."""
    held = kept = saved = forward = backward = collected = 0
    begun = set()
    for kind, stage, _ in (part for action in actions for part in parts(action)):
        each = stages[stage].later if stage in begun else stages[stage].first
        if kind == "F":
            forward = max(forward, kept + held + each.forward)
            held += each.saved
            saved = max(saved, held)
        elif kind == "I":
            backward = max(backward, kept + held - each.saved + each.input_backward)
            held += each.between - each.saved
            saved = max(saved, held)
        else:
            before, most = (each.saved, each.backward) if kind == "B" else (each.between, each.weight_backward)
            held -= before
            backward = max(backward, kept + held + most)
            collected = max(collected, kept + held + each.left)
            kept += each.stays
            begun.add(stage)
    return StepBytes(saved=saved, forward=forward, backward=backward, collected=collected)


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """The memory of one rank by moment of the step."""

    state: StateBytes
    step: StepBytes

    @property
    def forward(self) -> int:
        """The most during forward passes."""
        return self.state.standing + self.state.gathered + self.state.fetched + self.step.forward

    @property
    def backward(self) -> int:
        """The most during backward passes and when their gradients are taken."""
        state, step = self.state, self.step
        return state.standing + state.gathered + max(step.backward, step.collected + state.end_bucket)

    @property
    def update(self) -> int:
        """The most while gradients are reduced and the optimizer steps."""
        return self.state.standing + self.state.gathered + self.state.update

    @property
    def peak(self) -> int:
        """The most at any moment."""
        return max(self.forward, self.backward, self.update)


def state_bytes(
    config: RunConfig,
    parameter_sizes: Sequence[int],
    optimizer_elements: int,
    data_parallel_size: int,
    micro_batches: int,
) -> StateBytes:
    """What a rank with parameters of these numbers of elements holds under the run's ZeRO stage.

    The optimizer keeps `optimizer_elements` of all of them, in fp32.
    """
    parameters = sum(parameter_sizes)
    precision, size = config.precision, SIZES[config.precision.dtype]
    wide = 4 if precision.grad_accum_dtype == "fp32" else size
    flat = 4 * min(parameters, ENGINE_BUCKET)
    stage, part = zero_stage(config), -(-parameters // data_parallel_size)
    if stage == 0:
        return StateBytes(
            weights=parameters * size,
            master=4 * parameters if precision.dtype != "fp32" else 0,
            moments=4 * optimizer_elements,
            gradients=0,
            update=wide * parameters + flat,
            keep="step",
        )
    state = StateBytes(
        weights=(part if stage == 3 else parameters) * size,
        master=4 * part,
        moments=4 * -(-optimizer_elements // data_parallel_size),
        gradients=0,
        update=4 * part,
        keep="pass" if config.parallel.pipeline_model_parallel_size > 1 else "no",
    )
    zero = engine_json(config, data_parallel_size)["zero_optimization"]
    if stage == 3:
        live = min(parameters, int(zero.get("stage3_max_live_parameters", MAX_LIVE)))
        kept = wide * part + _bucket(zero, 3) * size  # stage 3 keeps its bucket between steps
        ahead = 0 if config.parallel.pipeline_model_parallel_size > 1 else _fetched_ahead(zero, parameter_sizes)
        return replace(state, gradients=kept, gathered=live * size, fetched=ahead * size)
    if stage == 1 and precision.bf16 and precision.grad_accum_dtype == "fp32":
        # DeepSpeed's BF16_Optimizer: a flat fp32 gradient of everything
        return replace(state, gradients=4 * parameters, update=size * parameters + flat)
    if offloads_optimizer(config):  # on a CPU host the state is in the same memory
        state = replace(state, gradients=4 * part)
    bucket = _bucket(zero, stage) * size
    if stage == 1:
        return _stage_one(state, bucket, wide * parameters)
    return _stage_two(state, bucket, wide * part, micro_batches)


def _stage_one(state: StateBytes, bucket: int, gradients: int) -> StateBytes:
    """All gradients stay at the parameters; a pipeline reduces them after its last backward pass."""
    if state.keep == "pass":
        return replace(state, update=state.update + gradients + bucket, keep="step")
    return replace(state, update=state.update + gradients, pass_bucket=bucket, keep="step")


def _stage_two(state: StateBytes, bucket: int, part: int, micro_batches: int) -> StateBytes:
    """The rank's part of the gradients is summed up beside the parameters where there are several micro-batches.

    Each backward pass then collects its own in a buffer of the same size.
    """
    if state.gradients == 0:
        state = replace(state, gradients=part) if micro_batches > 1 else replace(state, update=state.update + part)
    if state.keep == "pass":
        return replace(state, end_bucket=bucket)
    return replace(state, pass_bucket=bucket + (part if micro_batches > 1 else 0))


def _fetched_ahead(zero: dict[str, Any], parameter_sizes: Sequence[int]) -> int:
    """Elements that stage 3 fetches at once while the first parameter is used; it always has the small ones."""
    smallest = int(zero.get("stage3_param_persistence_threshold", PERSISTENT))
    spread = [size for size in parameter_sizes if size > smallest]
    return min(sum(spread[1:]), int(zero.get("stage3_prefetch_bucket_size", PREFETCHED)))


def _bucket(zero: dict[str, Any], stage: int) -> int:
    """Elements of the gradient buffers; two take turns where reduction overlaps with the backward pass."""
    if stage < 3 and not zero.get("contiguous_gradients", True):
        return 0
    buffers = 2 if stage < 3 and zero.get("overlap_comm", False) else 1
    return buffers * int(zero["reduce_bucket_size"])
