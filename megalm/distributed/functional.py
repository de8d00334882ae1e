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
that all ranks do the same with it. Who needs the result of `all_gather_sequence` in the backward pass need not keep it:
`regathered`. Source: Shoeybi et al. 2019 (arXiv:1909.08053, section 3, f and g); Korthikanti et al. 2022
(arXiv:2205.05198, section 4.2.2, g and its conjugate).
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
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
    return _begin_all_gather(x, group, dim).wait()


def reduce_scatter(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """A new tensor: this rank's part along `dim` of the sum of the ranks' `x`. No gradient."""
    result, work = _begin_reduce_scatter(x, group, dim)
    work.wait()
    return result


def _begin_all_gather(x: Tensor, group: ProcessGroup, dim: int) -> "_Gathering":
    """The ranks' `x`, on their way."""
    size, dim = dist.get_world_size(group), dim % x.dim()
    end_to_end = x.shape[:dim].numel() == 1  # the ranks' tensors stand in memory as they come, one behind the other
    shape = list(x.shape)
    shape[dim if end_to_end else 0] *= size
    gathered = x.new_empty(shape)
    work = dist.all_gather_single(gathered.view(-1), x.detach().contiguous().view(-1), group=group, async_op=True)
    assert work is not None, "this rank is in the group"
    return _Gathering(work, gathered, 1 if end_to_end else size, dim)


@dataclass(frozen=True)
class _Gathering:
    """An all-gather that has begun."""

    work: dist.Work
    gathered: Tensor
    pieces: int
    """Runs of rows that have yet to be laid end to end along `dim`."""
    dim: int

    def wait(self) -> Tensor:
        """Its result."""
        self.work.wait()
        return self.gathered if self.pieces == 1 else torch.cat(self.gathered.chunk(self.pieces), self.dim)


def _begin_reduce_scatter(x: Tensor, group: ProcessGroup, dim: int) -> tuple[Tensor, dist.Work]:
    """The tensor that will hold the result, and what to wait for."""
    size = dist.get_world_size(group)
    assert x.shape[dim] % size == 0, f"dim {dim} of {tuple(x.shape)} is a multiple of {size} ranks"
    dim %= x.dim()
    end_to_end = x.shape[:dim].numel() == 1
    parts = x.detach().contiguous() if end_to_end else torch.cat(x.detach().chunk(size, dim))
    shape = list(x.shape)
    shape[dim] //= size
    result = x.new_empty(shape)
    work = dist.reduce_scatter_single(result.view(-1), parts.view(-1), group=group, async_op=True)
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


def regathered(x: Tensor) -> "Regathered | None":
    """A claim to `x` in the backward pass, if it is the result of `all_gather_sequence`; None for any other tensor.

    Who has it need not keep `x`, which is gathered again from the ranks' parts, once for all claims.
    """
    node: Any = x.grad_fn
    # DeepSpeed's ZeRO 3 passes the inputs of modules on through nodes of its own
    while node is not None and getattr(node, "_forward_cls", None) is not _AllGatherSequence:
        node = node.next_functions[0][0] if len(node.next_functions) == 1 else None
    if node is None or not node.again.is_of(x):
        return None
    node.again.users += 1
    return Regathered(node, node.again.users)


@dataclass(frozen=True)
class Regathered:
    """One user's claim to the result of `all_gather_sequence` in the backward pass.

    Phases: `begin` the all-gather, unless another user has; `take` the result, which goes with its last user.
    """

    node: Any
    """The autograd node of `all_gather_sequence`, which has saved the rank's own part."""
    number: int

    def begin_before(self, y: Tensor) -> Tensor:
        """`y`. Backward: `begin`, then identity."""
        apply: Callable[[Tensor, Regathered], Tensor] = _BeginGather.apply
        return apply(y, self)

    def begin(self) -> None:
        """Begin the all-gather, if no other user has."""
        again: _Again = self.node.again
        if again.gathering is None and again.whole is None:
            (part,) = self.node.saved_tensors
            again.begin(part)
        again.waiting.add(self.number)

    def take(self) -> Tensor:
        """The ranks' parts laid end to end, as in the forward pass."""
        again: _Again = self.node.again
        return again.take(self.number)

    def begin_and_take(self) -> Tensor:
        """Both, for who has nothing to do meanwhile."""
        self.begin()
        return self.take()


class _Again:
    """The result of `all_gather_sequence` in the backward pass; it refers to no node, which would be a circle."""

    def __init__(self, whole: Tensor, group: ProcessGroup, dim: int) -> None:
        self.group, self.dim = group, dim
        self.users = 0
        self.waiting: set[int] = set()
        """Users that have not taken it since it was begun; a backward pass towards some weights leaves the others."""
        self.gathering: _Gathering | None = None
        self.whole: Tensor | None = None
        self._shape, self._storage = whole.shape, weakref.ref(whole.untyped_storage())

    def is_of(self, x: Tensor) -> bool:
        """Whether `x` is the result of the forward pass: the same elements of the same memory."""
        return x.untyped_storage() is self._storage() and x.shape == self._shape and x.is_contiguous()

    def begin(self, part: Tensor) -> None:
        """Begin the all-gather, for all users."""
        self.gathering = _begin_all_gather(part, self.group, self.dim)
        self.waiting.update(range(1, self.users + 1))

    def take(self, user: int) -> Tensor:
        """The result; the last user's leaves nothing behind."""
        if self.gathering is not None:
            self.whole, self.gathering = self.gathering.wait(), None
        whole = self.whole
        assert whole is not None, "the all-gather has begun"
        self.waiting.discard(user)
        if not self.waiting:
            self.whole = None
        return whole


class _BeginGather(torch.autograd.Function):
    """Forward: identity. Backward: identity; the all-gather of a `Regathered` begins."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, source: Regathered) -> Tensor:
        ctx.source = source
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        ctx.source.begin()
        return grad_outputs[0], None


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
    """Forward: all-gather. Backward: begin of the reduce-scatter. Saved: the rank's own part, to gather again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int, pending: _Pending) -> Tensor:
        ctx.group, ctx.dim, ctx.pending = group, dim, pending
        ctx.save_for_backward(x)
        whole = all_gather(x, group, dim)
        ctx.again = _Again(whole, group, dim)
        return whole

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
