"""Each collective that gradients flow through, against its conjugate: <f(x), y> = <x, f*(y)> summed over the ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megalm.distributed import functional
from megalm.distributed.functional import (
    after_comm,
    all_gather,
    all_gather_from_region,
    all_gather_sequence,
    all_reduce,
    all_reduce_from_region,
    copy_to_region,
    own_shard,
    reduce_scatter,
    reduce_scatter_sequence,
    regathered,
)
from megalm.parallel import tensor
from megalm.parallel.tensor import ColumnParallelLinear
from megalm.testing.spawner import run_on_ranks

SHAPE = (3, 4, 5)
SEQUENCE = 1


def world() -> ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def drawn(rank: int, *shape: int) -> Tensor:
    """Whole numbers, so that sums are exact in every order."""
    return torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(rank)).float()


def values() -> dict[str, tuple[Tensor, Tensor]]:
    """Forward value and gradient of every function, from this rank's own input and incoming gradient."""
    rank, group = dist.get_rank(), world()
    functions: dict[str, Any] = {
        "copy_to_region": lambda x: copy_to_region(x, group),
        "all_reduce_from_region": lambda x: all_reduce_from_region(x, group),
        **{
            f"{function.__name__} {dim}": lambda x, f=function, d=dim: f(x, group, d)
            for function in (all_gather_sequence, reduce_scatter_sequence, all_gather_from_region)
            for dim in (0, SEQUENCE, -1)
        },
    }
    found = {}
    for name, function in functions.items():
        x = drawn(rank, 6, 6, 6).requires_grad_()
        y = function(x)
        y.backward(drawn(100 + rank, *y.shape))
        assert x.grad is not None
        found[name] = (y.detach(), x.grad)
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_values_and_gradients_are_those_of_the_table(ranks: int) -> None:
    by_rank = run_on_ranks(ranks, values)
    xs = [drawn(rank, 6, 6, 6) for rank in range(ranks)]
    for rank, found in enumerate(by_rank):

        def incoming(shape: torch.Size) -> list[Tensor]:
            return [drawn(100 + r, *shape) for r in range(ranks)]

        y, grad = found["copy_to_region"]
        assert torch.equal(y, xs[rank])
        assert torch.equal(grad, sum(incoming(y.shape)))
        y, grad = found["all_reduce_from_region"]
        assert torch.equal(y, sum(xs))
        assert torch.equal(grad, incoming(y.shape)[rank])
        for dim in (0, SEQUENCE, -1):
            y, grad = found[f"all_gather_sequence {dim}"]
            assert torch.equal(y, torch.cat(xs, dim))
            assert torch.equal(grad, sum(incoming(y.shape)).chunk(ranks, dim)[rank])
            y, grad = found[f"reduce_scatter_sequence {dim}"]
            assert torch.equal(y, sum(xs).chunk(ranks, dim)[rank])
            assert torch.equal(grad, torch.cat(incoming(y.shape), dim))
            y, grad = found[f"all_gather_from_region {dim}"]
            assert torch.equal(y, torch.cat(xs, dim))
            assert torch.equal(grad, incoming(y.shape)[rank].chunk(ranks, dim)[rank])


def in_groups_of_two() -> list[Tensor]:
    """Plain collectives over this rank's pair of neighbours among four."""
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = pairs[rank // 2]
    x = drawn(rank, 4, 4)
    return [
        x,
        all_reduce(x, group),
        all_gather(x, group, 1),
        reduce_scatter(x, group, 1),
        own_shard(x, group, 1),
        all_reduce(x, group, dist.ReduceOp.MAX),
    ]


def test_a_collective_stays_in_its_group_and_leaves_its_argument_alone() -> None:
    by_rank = run_on_ranks(4, in_groups_of_two)
    for rank, (x, total, joined, part, own, largest) in enumerate(by_rank):
        pair = [drawn(r, 4, 4) for r in (rank // 2 * 2, rank // 2 * 2 + 1)]
        assert torch.equal(x, drawn(rank, 4, 4))
        assert torch.equal(total, sum(pair))
        assert torch.equal(joined, torch.cat(pair, 1))
        assert torch.equal(part, sum(pair).chunk(2, 1)[rank % 2])
        assert torch.equal(own, x.chunk(2, 1)[rank % 2])
        assert torch.equal(largest, torch.maximum(*pair))


class Noted(torch.autograd.Function):
    """Forward: double. Backward: note that it ran."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, notes: list[str]) -> Tensor:
        ctx.notes = notes
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        ctx.notes.append("after_comm")
        return 2 * grad_outputs[0], None


def order_of_backward() -> list[str]:
    notes: list[str] = []
    begin, end = functional._CopyToRegion.backward, functional._Awaited.backward
    functional._CopyToRegion.backward = lambda *a: notes.append("begin") or begin(*a)
    functional._Awaited.backward = lambda *a: notes.append("end") or end(*a)
    x, w = (torch.ones(2, requires_grad=True) for _ in range(2))
    entered = copy_to_region(2 * x, world())
    weighted = Noted.apply(w, notes)
    after_comm(weighted.grad_fn, entered)
    (entered * 3 + weighted).sum().backward()
    return notes


def test_late_work_runs_between_begin_and_end_of_the_collective() -> None:
    assert run_on_ranks(2, order_of_backward) == [["begin", "after_comm", "end"]] * 2


def gradients_of_linears() -> tuple[list[str], list[bool]]:
    """The order of a backward pass through two column-parallel layers, and whether its gradients are torch's own."""
    notes: list[str] = []
    for owner, word in (
        (functional._AllGatherSequence, "begin"), (tensor._WeightGradient, "weight"), (functional._Awaited, "end"),
    ):  # fmt: skip
        original = owner.backward
        owner.backward = lambda *a, f=original, w=word: notes.append(w) or f(*a)
    linears = [ColumnParallelLinear(5, 3), ColumnParallelLinear(5, 3)]
    x = drawn(dist.get_rank(), 2, 4, 5).requires_grad_()
    results = []
    for forward in (ColumnParallelLinear.forward, torch.nn.Linear.forward):
        whole = all_gather_sequence(2 * x, world(), SEQUENCE)
        y = sum(forward(linear, whole).square().sum() for linear in linears)
        leaves = [x, *(parameter for linear in linears for parameter in linear.parameters())]
        results.append(torch.autograd.grad(y, leaves))
    return notes[:4], [torch.equal(one, other) for one, other in zip(*results, strict=True)]


def test_weight_gradients_are_computed_while_the_input_gradient_is_summed() -> None:
    for order, equal in run_on_ranks(2, gradients_of_linears):
        assert order == ["begin", "weight", "weight", "end"]
        assert all(equal)


def gathers_of_linears() -> tuple[dict[str, int], bool]:
    """All-gathers of each pass of three layers that share an input, and whether gradients are those of a kept one."""
    counts: dict[str, int] = {}
    begin = functional._begin_all_gather

    def counted(*arguments: Any) -> Any:
        counts[phase] = counts.get(phase, 0) + 1
        return begin(*arguments)

    functional._begin_all_gather = counted
    linears = [ColumnParallelLinear(5, width) for width in (3, 3, 2)]
    weights = [parameter for linear in linears for parameter in linear.parameters()]
    x = drawn(dist.get_rank(), 2, 4, 5).requires_grad_()

    def loss(forward: Any) -> Tensor:
        whole = all_gather_sequence(2 * x, world(), SEQUENCE)
        return sum(forward(linear, whole).square().sum() for linear in linears)

    phase = "kept"
    expected = torch.autograd.grad(loss(torch.nn.Linear.forward), [x, *weights])
    phase = "forward"
    y = loss(ColumnParallelLinear.forward)
    phase = "input"
    found = [*torch.autograd.grad(y, [x], retain_graph=True)]
    phase = "one layer after the other"
    for linear in linears:
        found += torch.autograd.grad(y, list(linear.parameters()), retain_graph=True)
    phase = "both"
    again = torch.autograd.grad(y, [x, *weights])
    equal = all(map(torch.equal, found, expected)) and all(map(torch.equal, again, expected))
    return counts, equal


def test_a_shared_input_is_gathered_again_once_and_only_for_weight_gradients() -> None:
    for counts, equal in run_on_ranks(2, gathers_of_linears):
        assert equal
        assert counts == {"kept": 1, "forward": 1, "one layer after the other": 1, "both": 1}


def order_of_gathering_again() -> list[str]:
    notes: list[str] = []
    for owner, word in (
        (functional._BeginGather, "gather"), (tensor._InputGradient, "input"),
        (functional._AllGatherSequence, "scatter"),
        (tensor._WeightGradient, "weight"),
    ):  # fmt: skip
        original = owner.backward
        owner.backward = lambda *a, f=original, w=word: notes.append(w) or f(*a)
    x = drawn(dist.get_rank(), 2, 4, 5).requires_grad_()
    ColumnParallelLinear(5, 3)(all_gather_sequence(2 * x, world(), SEQUENCE)).sum().backward()
    return notes


def test_the_input_gradient_is_computed_while_its_input_is_gathered_again() -> None:
    assert run_on_ranks(2, order_of_gathering_again) == [["gather", "input", "scatter", "weight"]] * 2


class PassedOn(torch.autograd.Function):
    """The same memory, as DeepSpeed's ZeRO 3 passes on the inputs of modules."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        return grad_outputs


def recognised() -> list[bool]:
    x = drawn(dist.get_rank(), 2, 4, 5).requires_grad_()
    whole = all_gather_sequence(2 * x, world(), SEQUENCE)
    others = whole.relu(), whole[:1], whole.transpose(0, 1), copy_to_region(x, world()), x
    return [regathered(tensor) is not None for tensor in (whole, PassedOn.apply(whole), *others)]


def test_only_what_was_gathered_is_gathered_again() -> None:
    assert run_on_ranks(2, recognised) == [[True, True, False, False, False, False, False]] * 2
