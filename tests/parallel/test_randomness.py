"""Dropout inside the tensor-parallel region draws on each rank for itself, and leaves the numbers outside alone."""

import pytest
import torch
from torch import Tensor, nn

from megalm.kernels.backend import FUSED, REFERENCE
from megalm.kernels.building import library
from megalm.models.blocks.dropout import Dropout
from megalm.parallel.randomness import ChannelParallelDropout, OwnDropout
from megalm.parallel.region import TensorParallel
from megalm.parallel.sequence import SequenceParallelDropout
from megalm.planner.absent import AbsentRanks


def drawn(rank: int, training: bool = True) -> tuple[Tensor, Tensor]:
    """What dropout inside the region leaves of ones on `rank`, and the numbers drawn after it."""
    torch.manual_seed(3)
    core = OwnDropout(nn.Dropout(0.5), rank).train(training)
    return core(torch.ones(64)), torch.rand(4)


def test_ranks_drop_differently_inside_and_draw_the_same_afterwards() -> None:
    masks, after = zip(*(drawn(rank) for rank in range(4)), strict=True)
    assert len({tuple(mask.tolist()) for mask in masks}) == 4
    assert all(torch.equal(numbers, after[0]) for numbers in after)


def test_the_same_seed_drops_the_same() -> None:
    assert all(torch.equal(one, other) for one, other in zip(drawn(1), drawn(1), strict=True))


def test_evaluation_drops_and_draws_nothing() -> None:
    kept, after = drawn(1, training=False)
    torch.manual_seed(3)
    assert torch.equal(kept, torch.ones(64))
    assert torch.equal(after, torch.rand(4))


def test_a_rank_keeps_the_mask_of_its_part_of_the_sequence_only() -> None:
    group = AbsentRanks(4)
    place = TensorParallel(group, rank=0, size=4, kv_copies=1, kv_group=group, sequence_parallel=True)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    x = torch.ones(1, 8, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        SequenceParallelDropout(place, 0.5)(x)
    assert kept
    assert max(kept) == x.numel() * 4


@pytest.mark.parametrize("fused", [False, True])
def test_ranks_drop_the_channels_that_one_device_would(fused: bool) -> None:
    if fused and not library.load("auto").fused:
        pytest.skip("no compiled kernels")
    group, x = AbsentRanks(3), torch.ones(2, 5, 12)

    def dropped(module: Dropout, part: Tensor) -> tuple[Tensor, Tensor]:
        module.use_kernels(FUSED if fused else REFERENCE)
        torch.manual_seed(3)
        return module(part.contiguous()), torch.rand(4)

    whole, after = dropped(Dropout(0.5), x)
    for rank, part in enumerate(x.chunk(3, dim=-1)):
        place = TensorParallel(group, rank=rank, size=3, kv_copies=1, kv_group=group, sequence_parallel=False)
        own, own_after = dropped(ChannelParallelDropout(place, 0.5), part)
        assert torch.equal(own, whole.chunk(3, dim=-1)[rank])
        assert torch.equal(own_after, after)
