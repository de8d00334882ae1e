"""The optimizer state of any ZeRO stage as slices of named tensors.

Stage 0 keeps whole tensors; 1 and 2 keep a range of each parameter group laid flat, 3 a range of each parameter.
DeepSpeed links each parameter to its range: `_hp_mapping` (1 and 2), `grad_position` (3).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
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

    What a parameter has beyond its shard_spec, vocabulary padding, is left out.
    """
    base = ds_engine.basic_optimizer
    slices = []
    for parameter, name in names.items():
        located = locate(ds_engine, zero_stage, parameter)
        if located is None:
            continue
        flat, offset, start, stop = located
        count = min(stop, shard_specs[name].box.numel) - start
        if count <= 0:
            continue
        moments = _moments(base, flat, state_kinds(name, shard_specs[name].shape))
        slices.append(
            StateSlice(
                name=name,
                shard_spec=shard_specs[name],
                start=start,
                stop=start + count,
                weight=flat.detach().view(-1).narrow(0, offset, count),
                moments={kind: tensor.view(-1).narrow(0, offset, count) for kind, tensor in moments.items()},
            )
        )
    return slices


def state_parts(
    ds_engine: Any, zero_stage: int, names: Mapping[nn.Parameter, str], shard_specs: Mapping[str, ShardSpec]
) -> list[StatePart]:
    """Where the state of each parameter lies, vocabulary padding included; not for stage 3."""
    parts = []
    for parameter, name in names.items():
        tensor, offset, start, stop = locate(ds_engine, zero_stage, parameter) or (None, 0, 0, 0)
        parts.append(
            StatePart(
                name=name,
                shard_spec=shard_specs[name],
                shape=tuple(parameter.shape),
                tensor=tensor,
                offset=offset,
                start=start,
                stop=stop,
            )
        )
    return parts


def locate(ds_engine: Any, zero_stage: int, parameter: Any) -> tuple[Tensor, int, int, int] | None:
    """(fp32 tensor that holds this rank's part, offset in it, start, stop in the parameter), or None."""
    optimizer = ds_engine.optimizer
    if zero_stage == 0:
        position = next(i for i, p in enumerate(optimizer.model_parameters) if p is parameter)
        return optimizer.masters[position], 0, 0, parameter.numel()
    if zero_stage == 3:
        group, offset, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = torch.distributed.get_rank(parameter.ds_process_group) * count
        stop = min(start + count, parameter.ds_numel)  # the last ranks' parts end in padding
        return (optimizer.fp32_partitioned_groups_flat[group], offset, start, stop) if stop > start else None
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    partitions = getattr(optimizer, "fp32_groups_flat_partition", None)  # BF16_Optimizer's name for them
    if partitions is None:
        partitions = optimizer.single_partition_of_fp32_groups
    flat = partitions[mapping.param_group_index]
    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
    return flat, here.start, there.start, there.start + there.numel


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
        start = torch.distributed.get_rank(parameter.ds_process_group) * held.ds_numel
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
        """Both, as JSON can hold them."""
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
