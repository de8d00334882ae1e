"""DeepSpeed's gradient norm where the ranks of one model copy hold different numbers of parameters: pipeline stages."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.utils import combine_grad_norm_groups
from torch import Tensor

_SUM = comm.ReduceOp.SUM
_INVALID = -1.0  # DeepSpeed's word for a norm that is not finite


def agree_on_norm(optimizer: Any, stage: int) -> None:
    """Let the ranks of a model copy add up their norms once a step; `optimizer` is DeepSpeed's of ZeRO 1 to 3.

    DeepSpeed does it for each parameter group, and at stage 3 for each run of `sub_group_size` elements. Of these every
    stage has its own number (a stage with the embedding alone has no group of norms and biases), and ranks that take
    part in different numbers of reductions wait for ever. Stage 3 also counts parameters that another rank counts.
    """
    name = "_get_norm_groups" if stage == 3 else "scaled_global_norm"
    if not hasattr(optimizer, name):  # BF16_Optimizer adds up once
        return
    of_rank, add_up = getattr(optimizer, name), optimizer._model_parallel_all_reduce

    def of_copy() -> Any:
        found = of_rank()
        norm = combine_grad_norm_groups(found) if stage == 3 else found
        squared = float(norm) ** 2 if norm >= 0 else math.inf
        summed = torch.tensor(squared, dtype=torch.float64, device=get_accelerator().current_device_name())
        add_up(tensor=summed, op=_SUM)
        total = summed.sqrt() if torch.isfinite(summed) else torch.full_like(summed, _INVALID)
        return [total.float()] if stage == 3 else total.float()

    setattr(optimizer, name, of_copy)
    optimizer._model_parallel_all_reduce = lambda tensor, op: add_up(tensor, op) if op != _SUM else None
    if stage == 3:
        _norm_of_owned(optimizer)


def _norm_of_owned(optimizer: Any) -> None:
    """Let ZeRO-3's norm leave out what is marked `ds_pipe_replicated`, as ZeRO 1 and 2 do."""
    norm, offloaded_norm = optimizer.get_grad_norm_direct, optimizer.complete_grad_norm_calculation_for_cpu_offload

    def of_counted(gradients: Iterable[Tensor], parameters: Iterable[Any], norm_type: float = 2) -> Any:
        parameters = list(parameters)
        counted = [
            torch.zeros_like(gradient) if parameter.ds_pipe_replicated else gradient
            for gradient, parameter in zip(gradients, parameters, strict=True)
        ]
        return norm(counted, parameters, norm_type)

    def of_counted_offloaded(parameters: Iterable[Any]) -> Any:
        parameters = list(parameters)
        for parameter in parameters:
            if parameter.ds_pipe_replicated:
                optimizer.norm_for_param_grads.pop(optimizer.get_param_id(parameter), None)
        return offloaded_norm(parameters)

    optimizer.get_grad_norm_direct = of_counted
    optimizer.complete_grad_norm_calculation_for_cpu_offload = of_counted_offloaded
