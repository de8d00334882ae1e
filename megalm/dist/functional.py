"""Collectives that gradients flow through, in conjugate pairs: the backward of one is the forward of the other.

What each value means decides which one is right. A tensor is *equal* on all ranks of a group, or it is a *term* (the
value is the sum over the ranks), or a *part* (the value is the ranks' tensors laid end to end). A gradient of an equal
tensor whose copies were used for different work is a term.

| function        | forward                | takes  | gives | backward               |
|-----------------|------------------------|--------|-------|------------------------|
| copy_to_group   | identity               | equal  | equal | all-reduce             |
| sum_over_group  | all-reduce             | term   | equal | identity               |
| gather_parts    | all-gather             | part   | equal | reduce-scatter         |
| scatter_sum     | reduce-scatter         | term   | part  | all-gather             |
| join_parts      | all-gather             | part   | equal | own part               |

`gather_parts` expects that the gathered tensor is used for different work on each rank, `join_parts` that all ranks do
the same with it. Source: Shoeybi et al. 2019 (arXiv:1909.08053, section 3, f and g); Korthikanti et al. 2022
(arXiv:2205.05198, section 4.2.2, g and its conjugate).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def copy_to_group(x: Tensor, group: ProcessGroup) -> Tensor:
    """`x`, equal on all ranks, for work that differs. Forward: identity. Backward: all-reduce over `group`."""
    apply: Callable[[Tensor, ProcessGroup], Tensor] = _CopyToGroup.apply
    return apply(x, group)


def sum_over_group(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of the ranks' `x`. Forward: all-reduce over `group`. Backward: identity."""
    apply: Callable[[Tensor, ProcessGroup], Tensor] = _SumOverGroup.apply
    return apply(x, group)


def gather_parts(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """The ranks' `x` laid end to end along `dim`. Forward: all-gather. Backward: reduce-scatter over `group`."""
    apply: Callable[[Tensor, ProcessGroup, int], Tensor] = _GatherParts.apply
    return apply(x, group, dim)


def scatter_sum(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """This rank's part along `dim` of the sum of the ranks' `x`. Forward: reduce-scatter. Backward: all-gather."""
    apply: Callable[[Tensor, ProcessGroup, int], Tensor] = _ScatterSum.apply
    return apply(x, group, dim)


def join_parts(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """The ranks' `x` laid end to end along `dim`, to be used alike. Forward: all-gather. Backward: own part."""
    apply: Callable[[Tensor, ProcessGroup, int], Tensor] = _JoinParts.apply
    return apply(x, group, dim)


def own_part(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """This rank's equal part of `x` along `dim` (a view); the size must be a multiple of the group's."""
    size = dist.get_world_size(group)
    assert x.shape[dim] % size == 0, f"dim {dim} of {tuple(x.shape)} is a multiple of {size} ranks"
    length = x.shape[dim] // size
    return x.narrow(dim, dist.get_rank(group) * length, length)


def all_reduce(x: Tensor, group: ProcessGroup, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """A new tensor: the reduction of the ranks' `x`. No gradient."""
    result = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, op=op, group=group)
    return result


def all_gather(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """A new tensor: the ranks' `x` laid end to end along `dim`. No gradient."""
    size = dist.get_world_size(group)
    gathered = x.new_empty(size * x.shape[0], *x.shape[1:])
    dist.all_gather_single(gathered, x.detach().contiguous(), group=group)
    if dim % x.dim() == 0:
        return gathered
    return torch.cat(gathered.chunk(size), dim)


def reduce_scatter(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """A new tensor: this rank's part along `dim` of the sum of the ranks' `x`. No gradient."""
    size = dist.get_world_size(group)
    assert x.shape[dim] % size == 0, f"dim {dim} of {tuple(x.shape)} is a multiple of {size} ranks"
    parts = x.detach() if dim % x.dim() == 0 else torch.cat(x.detach().chunk(size, dim))
    result = parts.new_empty(parts.shape[0] // size, *parts.shape[1:])
    dist.reduce_scatter_single(result, parts.contiguous(), group=group)
    return result


class _CopyToGroup(torch.autograd.Function):
    """Forward: identity. Backward: all-reduce."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad_outputs[0], ctx.group), None


class _SumOverGroup(torch.autograd.Function):
    """Forward: all-reduce. Backward: identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


class _GatherParts(torch.autograd.Function):
    """Forward: all-gather. Backward: reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return all_gather(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter(grad_outputs[0], ctx.group, ctx.dim), None, None


class _ScatterSum(torch.autograd.Function):
    """Forward: reduce-scatter. Backward: all-gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return reduce_scatter(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grad_outputs[0], ctx.group, ctx.dim), None, None


class _JoinParts(torch.autograd.Function):
    """Forward: all-gather. Backward: own part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return all_gather(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return own_part(grad_outputs[0], ctx.group, ctx.dim), None, None
