"""Collectives that gradients flow through, in conjugate pairs: the backward of one is the forward of the other.

What each value means decides which one is right. Over the ranks of a group a tensor is *Replicate* (equal on all),
*Partial* (the value is the sum over the ranks) or *Shard* (the value is the ranks' tensors laid end to end), as DTensor
calls them. A gradient of a replicated tensor whose copies were used for different work is Partial.

| function                | forward        | takes     | gives     | backward       |
|-------------------------|----------------|-----------|-----------|----------------|
| copy_to_region          | identity       | Replicate | Replicate | all-reduce     |
| all_reduce_from_region  | all-reduce     | Partial   | Replicate | identity       |
| all_gather_sequence     | all-gather     | Shard     | Replicate | reduce-scatter |
| reduce_scatter_sequence | reduce-scatter | Partial   | Shard     | all-gather     |
| all_gather_from_region  | all-gather     | Shard     | Replicate | own shard      |

The backward of `copy_to_region` and of `all_gather_sequence` begins when the gradient of the result is there and is
waited for where the gradient of `x` is wanted; gradients that `after_comm` has put in between are computed meanwhile.

`all_gather_sequence` expects that the gathered tensor is used for different work on each rank, `all_gather_from_region`
that all ranks do the same with it. Source: Shoeybi et al. 2019 (arXiv:1909.08053, section 3, f and g); Korthikanti et
al. 2022 (arXiv:2205.05198, section 4.2.2, g and its conjugate).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def copy_to_region(x: Tensor, group: ProcessGroup) -> Tensor:
    """`x`, Replicate, for work that differs. Forward: identity. Backward: all-reduce over `group`."""
    pending = _Pending()
    apply: Callable[[Tensor, ProcessGroup, _Pending], Tensor] = _CopyToRegion.apply
    return apply(_awaited(x, pending), group, pending)


def all_reduce_from_region(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of the ranks' `x`. Forward: all-reduce over `group`. Backward: identity."""
    apply: Callable[[Tensor, ProcessGroup], Tensor] = _AllReduceFromRegion.apply
    return apply(x, group)


def all_gather_sequence(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """The ranks' `x` laid end to end along `dim`. Forward: all-gather. Backward: reduce-scatter over `group`."""
    pending = _Pending()
    apply: Callable[[Tensor, ProcessGroup, int, _Pending], Tensor] = _AllGatherSequence.apply
    return apply(_awaited(x, pending), group, dim, pending)


def reduce_scatter_sequence(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """This rank's shard along `dim` of the sum of the ranks' `x`. Forward: reduce-scatter. Backward: all-gather."""
    apply: Callable[[Tensor, ProcessGroup, int], Tensor] = _ReduceScatterSequence.apply
    return apply(x, group, dim)


def all_gather_from_region(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """The ranks' `x` laid end to end along `dim`, to be used alike. Forward: all-gather. Backward: own shard."""
    apply: Callable[[Tensor, ProcessGroup, int], Tensor] = _AllGatherFromRegion.apply
    return apply(x, group, dim)


def own_shard(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """This rank's equal shard of `x` along `dim` (a view); the size must be a multiple of the group's."""
    size = dist.get_world_size(group)
    assert x.shape[dim] % size == 0, f"dim {dim} of {tuple(x.shape)} is a multiple of {size} ranks"
    length = x.shape[dim] // size
    return x.narrow(dim, group.rank() * length, length)


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
    result, work = _begin_reduce_scatter(x, group, dim)
    work.wait()
    return result


def _begin_reduce_scatter(x: Tensor, group: ProcessGroup, dim: int) -> tuple[Tensor, dist.Work]:
    """The tensor that will hold the result, and what to wait for."""
    size = dist.get_world_size(group)
    assert x.shape[dim] % size == 0, f"dim {dim} of {tuple(x.shape)} is a multiple of {size} ranks"
    parts = x.detach() if dim % x.dim() == 0 else torch.cat(x.detach().chunk(size, dim))
    result = parts.new_empty(parts.shape[0] // size, *parts.shape[1:])
    work = dist.reduce_scatter_single(result, parts.contiguous(), group=group, async_op=True)
    assert work is not None, "this rank is in the group"
    return result, work


def after_comm(node: Any, x: Tensor) -> None:
    """Let the autograd node `node` run after the collective in the backward of `x` has begun.

    `x` is the result of `copy_to_region` or `all_gather_sequence`; with any other, nothing changes. Of the nodes that
    are ready the one with the highest sequence number runs first.
    """
    begin: Any = x.grad_fn
    if getattr(begin, "_forward_cls", None) in (
        _CopyToRegion,
        _AllGatherSequence,
    ):  # how torch names the function of a node
        node._set_sequence_nr(begin.pending.order)


class _Pending:
    """A collective of the backward pass between its begin and its end."""

    work: dist.Work | None = None
    order = 0
    """A sequence number between that of the end and that of the begin."""


def _awaited(x: Tensor, pending: _Pending) -> Tensor:
    """`x`; its gradient is awaited."""
    apply: Callable[[Tensor, _Pending], Tensor] = _Awaited.apply
    result = apply(x, pending)
    if result.grad_fn is not None:
        node: Any = result.grad_fn
        pending.order = node._sequence_nr()
        node._set_sequence_nr(max(0, pending.order - 1))
    return result


class _Awaited(torch.autograd.Function):
    """Forward: identity. Backward: wait for what has begun."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pending: _Pending) -> Tensor:
        ctx.pending = pending
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        assert ctx.pending.work is not None, "the collective has begun"
        ctx.pending.work.wait()
        ctx.pending.work = None
        return grad_outputs[0], None


class _CopyToRegion(torch.autograd.Function):
    """Forward: identity. Backward: begin of the all-reduce."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, pending: _Pending) -> Tensor:
        ctx.group, ctx.pending = group, pending
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        result = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        ctx.pending.work = dist.all_reduce(result, group=ctx.group, async_op=True)
        return result, None, None


class _AllReduceFromRegion(torch.autograd.Function):
    """Forward: all-reduce. Backward: identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


class _AllGatherSequence(torch.autograd.Function):
    """Forward: all-gather. Backward: begin of the reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int, pending: _Pending) -> Tensor:
        ctx.group, ctx.dim, ctx.pending = group, dim, pending
        return all_gather(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        result, ctx.pending.work = _begin_reduce_scatter(grad_outputs[0], ctx.group, ctx.dim)
        return result, None, None, None


class _ReduceScatterSequence(torch.autograd.Function):
    """Forward: reduce-scatter. Backward: all-gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return reduce_scatter(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grad_outputs[0], ctx.group, ctx.dim), None, None


class _AllGatherFromRegion(torch.autograd.Function):
    """Forward: all-gather. Backward: own shard."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return all_gather(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return own_shard(grad_outputs[0], ctx.group, ctx.dim), None, None
