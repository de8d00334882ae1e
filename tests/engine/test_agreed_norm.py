"""The ranks of a model copy agree on one gradient norm, whatever number of parameter groups each has."""

import math

import pytest
import torch
import torch.distributed as dist
from deepspeed import comm
from torch import Tensor

from megalm.engine.deepspeed_patches import agree_on_norm
from megalm.testing.spawner import run_on_ranks

GROUPS = {0: [3.0, 4.0], 1: [12.0]}
"""Norms of the parameter groups of two pipeline ranks: different numbers of them."""


class Optimizer:
    """As much of DeepSpeed's ZeRO optimizers as takes part in the norm: a reduction for each parameter group."""

    def __init__(self, norms: list[float], stage: int) -> None:
        self.norms = norms
        self.reductions = 0
        setattr(
            self,
            "_get_norm_groups" if stage == 3 else "scaled_global_norm",
            self.of_groups if stage == 3 else self.of_all,
        )

    def _model_parallel_all_reduce(self, tensor: Tensor, op: comm.ReduceOp) -> None:
        assert op == comm.ReduceOp.SUM
        self.reductions += 1
        dist.all_reduce(tensor)

    def of_groups(self) -> list[Tensor]:
        found = []
        for norm in self.norms:
            squared = torch.tensor(norm**2)
            self._model_parallel_all_reduce(tensor=squared, op=comm.ReduceOp.SUM)
            found.append(squared.sqrt())
        return found

    def of_all(self) -> Tensor:
        found = torch.stack(self.of_groups())
        return found.norm() if torch.isfinite(found).all() else torch.tensor(-1.0)

    def get_grad_norm_direct(self, gradients: list[Tensor], parameters: list[Tensor], norm_type: float = 2) -> Tensor:
        return torch.cat([gradient.flatten() for gradient in gradients]).norm(norm_type)

    def complete_grad_norm_calculation_for_cpu_offload(self, parameters: list[Tensor]) -> Tensor:
        return torch.tensor(sum(value**2 for value in self.norm_for_param_grads.values())).sqrt()

    def get_param_id(self, parameter: Tensor) -> int:
        return id(parameter)


def agreed(stage: int, broken_rank: int | None) -> tuple[float, int]:
    """The norm of this rank under `stage`, and the number of reductions that it took part in."""
    rank = dist.get_rank()
    optimizer = Optimizer([math.inf] if rank == broken_rank else GROUPS[rank], stage)
    agree_on_norm(optimizer, stage)
    found = optimizer._get_norm_groups()[0] if stage == 3 else optimizer.scaled_global_norm()
    return float(found), optimizer.reductions


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_norm_is_that_of_all_groups_of_all_ranks(stage: int) -> None:
    assert run_on_ranks(2, agreed, stage, None) == [(13.0, 1)] * 2


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("broken_rank", [0, 1])
def test_all_ranks_hear_of_a_norm_that_is_not_finite(stage: int, broken_rank: int) -> None:
    assert run_on_ranks(2, agreed, stage, broken_rank) == [(-1.0, 1)] * 2


def counted_alone(direct: bool) -> float:
    """The norm at stage 3 of two gradients, of which another rank counts the second."""
    optimizer = Optimizer([], 3)
    agree_on_norm(optimizer, 3)
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    parameters[0].ds_pipe_replicated, parameters[1].ds_pipe_replicated = False, True
    if direct:
        gradients = [torch.tensor([3.0, 4.0]), torch.tensor([5.0, 12.0])]
        return float(optimizer.get_grad_norm_direct(gradients, parameters))
    optimizer.norm_for_param_grads = {id(parameters[0]): 5.0, id(parameters[1]): 13.0}
    return float(optimizer.complete_grad_norm_calculation_for_cpu_offload(parameters))


@pytest.mark.parametrize("direct", [True, False], ids=["device", "offloaded"])
def test_stage_3_leaves_out_what_another_rank_counts(direct: bool) -> None:
    assert counted_alone(direct) == 5.0
