"""Dropout inside the tensor-parallel region draws on each rank for itself, and leaves the numbers outside alone."""

import torch
from torch import Tensor, nn

from megalm.parallel.randomness import OwnDropout


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
