"""The optimizer state of any ZeRO stage as slices of named tensors.

Stage 0 keeps whole tensors; 1 and 2 keep a range of each parameter group laid flat, 3 a range of each parameter.
Where a parameter lies in its group (1 and 2) its own memory says, which is a part of the flat group: DeepSpeed's
`_hp_mapping` supposes the order of the group and is wrong under "round_robin_gradients". At 3 `grad_position` says it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalm.distributed.shards import ShardSpec, StateSlice
from megalm.engine.optimizers.spec import StatePart
from megalm.storage.documents import Count, validated

StateKinds = Callable[[str, tuple[int, ...]], tuple[str, ...]]
"""What the optimizer keeps of a parameter: (name, whole shape) -> kinds."""
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def state_slices(
    ds_engine: Any,
    zero_stage: int,
    names: dict[nn.Parameter, str],
    shard_specs: Mapping[str, ShardSpec],
    state_kinds: StateKinds,
) -> list[StateSlice]:
    """What this rank keeps, in the order of `names`; moments that do not exist yet are created as zeros.

    What a parameter has beyond its shard_spec, vocabulary padding, is left out. A tensor of which nothing else is here
    has moments and counts steps all the same, or a resumed run would be at two steps at once.
    """
    base = ds_engine.basic_optimizer
    slices = []
    for parameter, name in names.items():
        part = locate(ds_engine, zero_stage, parameter)
        moments = _moments(base, part.tensor, state_kinds(name, shard_specs[name].shape))
        count = min(part.stop, shard_specs[name].box.numel) - part.start
        if count <= 0:
            continue
        slices.append(
            StateSlice(
                name=name,
                shard_spec=shard_specs[name],
                start=part.start,
                stop=part.start + count,
                weight=part.tensor.detach().view(-1).narrow(0, part.offset, count),
                moments={kind: tensor.view(-1).narrow(0, part.offset, count) for kind, tensor in moments.items()},
            )
        )
    return slices


def state_parts(
    ds_engine: Any, zero_stage: int, names: Mapping[nn.Parameter, str], shard_specs: Mapping[str, ShardSpec]
) -> list[StatePart]:
    """Where the state of each parameter lies, vocabulary padding included; not for stage 3."""
    parts = []
    for parameter, name in names.items():
        part = locate(ds_engine, zero_stage, parameter)
        parts.append(
            StatePart(
                name=name,
                shard_spec=shard_specs[name],
                shape=tuple(parameter.shape),
                tensor=part.tensor if part.start < part.stop else None,
                offset=part.offset,
                start=part.start,
                stop=part.stop,
            )
        )
    return parts


@dataclass(frozen=True)
class Located:
    """Elements start..stop of a rank's parameter, which are at `offset` of `tensor`, fp32; none where start is stop."""

    tensor: Tensor
    offset: int
    start: int
    stop: int


def locate(ds_engine: Any, zero_stage: int, parameter: Any) -> Located:
    """Where this rank keeps its part of the parameter's fp32 weights."""
    optimizer = ds_engine.optimizer
    if zero_stage == 0:
        position = next(i for i, p in enumerate(optimizer.model_parameters) if p is parameter)
        return Located(optimizer.masters[position], 0, 0, parameter.numel())
    if zero_stage == 3:
        group, offset, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = dist.get_rank(parameter.ds_process_group) * count
        stop = min(start + count, parameter.ds_numel)  # the last ranks' parts end in padding
        return Located(optimizer.fp32_partitioned_groups_flat[group], offset, start, max(start, stop))
    bf16 = hasattr(optimizer, "bf16_groups_flat")  # BF16_Optimizer has its own names
    wholes = optimizer.bf16_groups_flat if bf16 else optimizer.bit16_groups_flat
    partitions = optimizer.fp32_groups_flat_partition if bf16 else optimizer.single_partition_of_fp32_groups
    for number, (whole, own) in enumerate(zip(wholes, partitions, strict=True)):
        begin = (parameter.data_ptr() - whole.data_ptr()) // whole.element_size()
        if not 0 <= begin < whole.numel():
            continue
        first = dist.get_rank(optimizer.real_dp_process_group[number]) * own.numel() - begin
        start, stop = max(0, first), min(parameter.numel(), first + own.numel())
        return Located(own, start - first, start, stop) if start < stop else Located(own, 0, 0, 0)
    raise AssertionError("every parameter lies in a flat group")


def _moments(base: torch.optim.Optimizer, flat: Tensor, kinds: Iterable[str]) -> dict[str, Tensor]:
    """What the base optimizer keeps of one of its tensors, created as zeros before the first step."""
    entry = base.state[flat]
    if not entry:
        deepspeeds = type(base).__module__.startswith("deepspeed.")
        entry["step"] = 0 if deepspeeds else torch.zeros((), device=flat.device)
        entry.update({kind: torch.zeros_like(flat) for kind in kinds})
    return {kind: entry[kind] for kind in kinds}


def set_weight(parameter: Any, shard_spec: ShardSpec, part: Tensor) -> None:
    """Copy the fp32 elements of the parameter's shard_spec into the model's working copy (or this rank's part of it, at
    stage 3).
    """
    full = shard_spec.padded(part, tuple(getattr(parameter, "ds_shape", parameter.shape)))
    with torch.no_grad():
        if not hasattr(parameter, "ds_tensor"):
            parameter.data.copy_(full)
            return
        held: Any = parameter.ds_tensor
        start = dist.get_rank(parameter.ds_process_group) * held.ds_numel
        piece = full.reshape(-1)[start : start + held.ds_numel]
        held.data.view(-1)[: piece.numel()].copy_(piece)
        if parameter.numel() == parameter.ds_numel:  # small parameters stay gathered
            parameter.data.copy_(full)


@dataclass(frozen=True)
class _Scalars:
    """What a checkpoint keeps of `OptimizerScalars`."""

    optimizer_steps: Count
    loss_scaler: dict[str, int | float]


class OptimizerScalars:
    """The optimizer's state that is not a tensor: step count, and the loss scaler's counters if there is a scaler."""

    name = "optimizer"

    def __init__(self, ds_engine: Any, zero_stage: int) -> None:
        self._optimizer = ds_engine.basic_optimizer
        fp16 = zero_stage > 0 and ds_engine.fp16_enabled()
        self._scaler = (
            ds_engine.optimizer.scaler if zero_stage == 0 else ds_engine.optimizer.loss_scaler if fp16 else None
        )

    def state(self) -> dict[str, Any]:
        """Both, as JSON can hold them; a fixed loss scale is a setting, not state."""
        # the largest: what counts no steps (Muon's matrices) keeps the number that it was loaded with
        steps = [int(entry["step"]) for entry in self._optimizer.state.values() if "step" in entry]
        counters = {name: getattr(self._scaler, name) for name in _SCALER_FIELDS if hasattr(self._scaler, name)}
        return {"optimizer_steps": max(steps, default=0), "loss_scaler": counters}

    def load(self, state: dict[str, Any]) -> None:
        """Inverse of `state`; call after `state_slices` has created the moments.

        Raises:
            DocumentError: it is no such state.
        """
        given = validated(_Scalars, state)
        for entry in self._optimizer.state.values():
            if isinstance(entry.get("step"), Tensor):
                entry["step"].fill_(given.optimizer_steps)
            elif "step" in entry:
                entry["step"] = given.optimizer_steps
        for name, value in given.loss_scaler.items():
            if hasattr(self._scaler, name):
                setattr(self._scaler, name, value)
        if self._scaler is not None and hasattr(self._scaler, "min_scale"):
            self._scaler.cur_scale = max(self._scaler.cur_scale, self._scaler.min_scale)
