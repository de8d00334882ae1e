"""Sums of losses: the loss of a global batch does not depend on how it is cut."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megalm.models.blocks.loss import DatasetSums, summed_loss, token_count


@given(st.lists(st.tuples(st.floats(0, 20), st.booleans()), min_size=1, max_size=40), st.integers(1, 8))
def test_sum_and_count_of_the_parts_are_those_of_the_whole(pairs, parts):
    losses = torch.tensor([[loss for loss, _ in pairs]], dtype=torch.float32)
    mask = torch.tensor([[kept for _, kept in pairs]])
    pieces = list(zip(losses.chunk(parts, 1), mask.chunk(parts, 1), strict=True))
    torch.testing.assert_close(sum(summed_loss(*piece) for piece in pieces), summed_loss(losses, mask))
    assert sum(token_count(piece_mask) for _, piece_mask in pieces) == sum(kept for _, kept in pairs)


def test_masked_positions_pass_no_gradient_and_no_infinity():
    losses = torch.tensor([[1.0, float("inf"), 2.0, float("nan")]], requires_grad=True)
    total = summed_loss(losses, torch.tensor([[1, 0, 1, 0]]))
    total.backward()
    assert total.item() == 3.0
    assert losses.grad.tolist() == [[1.0, 0.0, 1.0, 0.0]]


def test_sum_is_float32_whatever_the_inputs():
    losses = torch.full((1, 1000), 1.001).bfloat16()
    assert summed_loss(losses, torch.ones(1, 1000).bfloat16()).dtype == torch.float32
    assert token_count(torch.ones(1, 1000).bfloat16()).item() == 1000


def test_sums_by_dataset_are_those_of_their_rows() -> None:
    sums = DatasetSums(3, torch.device("cpu"))
    losses = torch.tensor([[1.0, 2.0], [4.0, float("nan")], [8.0, 16.0]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    sums.add(losses, mask, torch.tensor([2, 0, 2]))
    sums.add(losses[:1], mask[:1], torch.tensor([0]))
    assert sums.take().tolist() == [[7.0, 0.0, 19.0], [3.0, 0.0, 3.0]]
    assert sums.take().tolist() == [[0.0] * 3] * 2
