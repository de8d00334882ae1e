"""What one rank holds at its fullest: weights, optimizer state, gradients, ZeRO's buffers, activations.

The rules of each ZeRO stage are those of DeepSpeed 0.19 and of megalm's stage 0, in bytes of real allocations; sources:
Rajbhandari et al. 2020, arXiv:1910.02054, section 3, and `deepspeed/runtime/zero`.
"""

from dataclasses import dataclass
from typing import Any

from megalm.config import RunConfig, engine_json, offloads_optimizer, zero_stage
from megalm.planner.activations import ActivationBytes

ENGINE_BUCKET = 500_000_000
"""Elements that DeepSpeed lays flat at a time to reduce gradients outside of ZeRO."""
MAX_LIVE = 1_000_000_000
"""Default of stage3_max_live_parameters: gathered weights that stage 3 keeps before it lets go of any."""
SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """What a rank holds all the time, and what it needs more at each moment of a step."""

    weights: int
    master: int
    moments: int
    gradients: int
    """Gradient buffers that stand all the time."""
    gathered: int = 0
    """Weights of other ranks, gathered for use (ZeRO 3)."""
    bucket: int = 0
    """Buffers in which gradients are reduced during the backward pass."""
    update: int = 0
    """Gradients and their copies at the end of the step."""
    gradients_at_parameters: bool = False
    """Whether gradients stay with the parameters until the end of the step (then the activations count them)."""

    @property
    def gradients_at_end(self) -> int:
        """Gradients and their copies, buffers that stand all the time included."""
        return self.gradients + self.update

    @property
    def standing(self) -> int:
        """Bytes that are there at every moment."""
        return self.weights + self.master + self.moments + self.gradients


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """The memory of one rank by moment of the step."""

    state: StateBytes
    activations: ActivationBytes
    in_flight: float = 1
    """Micro-batches whose forward pass is done and whose backward pass is not, at the fullest (pipeline)."""

    @property
    def forward(self) -> int:
        """The most during forward passes."""
        return self.state.standing + self.state.gathered + self._waiting + self.activations.peak_forward

    @property
    def backward(self) -> int:
        """The most during backward passes."""
        state = self.state
        return state.standing + state.gathered + state.bucket + self._waiting + self.activations.peak_backward

    @property
    def update(self) -> int:
        """The most while gradients are reduced and the optimizer steps."""
        return self.state.standing + self.state.gathered + self.state.update

    @property
    def peak(self) -> int:
        """The most at any moment."""
        return max(self.forward, self.backward, self.update)

    @property
    def _waiting(self) -> int:
        return int(max(0.0, self.in_flight - 1) * self.activations.saved)

    @property
    def waiting_and_saved(self) -> int:
        """Activations kept for backward passes, at the fullest."""
        return self._waiting + self.activations.saved


def state_bytes(config: RunConfig, parameters: int, data_parallel_size: int) -> StateBytes:
    """What a rank with `parameters` of the model holds under the run's ZeRO stage."""
    stage, shards = zero_stage(config), data_parallel_size
    size, low = SIZES[config.precision.dtype], config.precision.dtype != "fp32"
    zero = engine_json(config, data_parallel_size)["zero_optimization"]
    part = -(-parameters // shards)
    host = offloads_optimizer(config)  # on a CPU host the state is in the same memory
    if stage == 0:
        wide = 4 if config.precision.grad_accum_dtype == "fp32" or not low else size
        flat = min(parameters, ENGINE_BUCKET)
        return StateBytes(
            weights=parameters * size,
            master=4 * parameters if low else 0,
            moments=8 * parameters,
            gradients=0,
            update=wide * parameters + 4 * flat,
            gradients_at_parameters=True,
        )
    if stage == 3:
        return _stage_three(config, zero, parameters, part, size)
    if stage == 1 and config.precision.bf16 and config.precision.grad_accum_dtype == "fp32":
        return StateBytes(  # DeepSpeed's BF16_Optimizer: a flat fp32 gradient of everything
            weights=parameters * size,
            master=4 * part,
            moments=8 * part,
            gradients=4 * parameters,
            update=size * parameters + 4 * min(parameters, ENGINE_BUCKET),
        )
    kept = parameters if stage == 1 else part
    return StateBytes(
        weights=parameters * size,
        master=4 * part,
        moments=8 * part,
        gradients=4 * part if host else 0,
        bucket=_bucket(zero, stage) * size,
        update=size * kept + 4 * part,
    )


def _stage_three(config: RunConfig, zero: dict[str, Any], parameters: int, part: int, size: int) -> StateBytes:
    wide = 4 if config.precision.grad_accum_dtype == "fp32" else size
    live = min(parameters, int(zero.get("stage3_max_live_parameters", MAX_LIVE)))
    return StateBytes(
        weights=part * size,
        master=4 * part,
        moments=8 * part,
        gradients=wide * part + _bucket(zero, 3) * size,  # stage 3 keeps its bucket between steps
        gathered=live * size,
        update=4 * part,
    )


def _bucket(zero: dict[str, Any], stage: int) -> int:
    """Elements of the gradient buffers; two take turns where reduction overlaps with the backward pass."""
    if stage < 3 and not zero.get("contiguous_gradients", True):
        return 0
    buffers = 2 if stage < 3 and zero.get("overlap_comm", False) else 1
    return buffers * int(zero["reduce_bucket_size"])
