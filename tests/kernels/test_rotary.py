"""Rotary embedding: the pairing, the angles, and what makes it a relative position."""

import math

import pytest
import torch
from kernels.fused import DTYPES, TOLERANCE, check, check_beside, leaf, needs_fused, on_copies, opcheck

from megalm.kernels.rotary import apply_rotary, fused_rotary, rotary_tables


def test_channel_pairs_turn_by_position_times_frequency():
    positions = torch.tensor([[0, 3]])
    cos, sin = rotary_tables(positions, 4, base=100.0)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).expand(1, 2, 1, 5)  # channel 4 is past the rotary width
    y = apply_rotary(x, cos, sin)
    assert y[0, 0, 0].tolist() == [1, 2, 3, 4, 5]
    expected = []
    for first, second, frequency in [(1.0, 3.0, 1.0), (2.0, 4.0, 0.1)]:
        angle = 3 * frequency
        expected.append(first * math.cos(angle) - second * math.sin(angle))
        expected.append(second * math.cos(angle) + first * math.sin(angle))
    assert y[0, 1, 0].tolist() == pytest.approx([expected[0], expected[2], expected[1], expected[3], 5.0])


def test_scores_depend_on_the_distance_only():
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)

    def score(query_position, key_position):
        tables = [rotary_tables(torch.tensor([[p]]), 8, 10000.0) for p in (query_position, key_position)]
        return (apply_rotary(q, *tables[0]) * apply_rotary(k, *tables[1])).sum()

    torch.testing.assert_close(score(5, 2), score(105, 102), rtol=1e-5, atol=1e-5)
    assert abs(score(5, 2) - score(5, 3)) > 1e-4


def test_interpolation_divides_positions():
    tables = rotary_tables(torch.tensor([[8]]), 8, 10000.0, interpolation_factor=4.0)
    for table, expected in zip(tables, rotary_tables(torch.tensor([[2]]), 8, 10000.0), strict=True):
        assert torch.equal(table, expected)


def test_bfloat16_input_is_turned_in_float32_and_rounded_once():
    x = torch.randn(2, 9, 3, 6).bfloat16()
    tables = rotary_tables(torch.arange(1000, 1009)[None], 6, 10000.0)
    assert torch.equal(apply_rotary(x, *tables), apply_rotary(x.float(), *tables).bfloat16())


def test_gradient_matches_finite_differences():
    tables = rotary_tables(torch.arange(3)[None], 4, 100.0)
    x = torch.randn(2, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    tables = tuple(table.double() for table in tables)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, *tables), (x,))


@on_copies(sizes=[(3, 64, 64), (1, 38, 34), (2, 5, 2)], dtype=DTYPES)
def test_fused_rotary(sizes, dtype):
    heads, width, turned = sizes
    positions = torch.tensor([[0, 1, 2, 0, 1], [5, 6, 7, 8, 9]])  # a document ends in the first row
    tables = rotary_tables(positions, turned, 100.0)
    x = leaf(2, 5, heads, width, dtype=dtype)
    check(lambda x: fused_rotary(x, *tables), lambda x: apply_rotary(x, *(t.double() for t in tables)), (x,))
    shared = tuple(table[:1] for table in tables)
    strided = torch.randn(2, 5, 4 * heads, width).to(dtype)[:, :, ::2]
    result = fused_rotary(strided, *shared)
    torch.testing.assert_close(result, apply_rotary(strided, *shared), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@on_copies(dtype=DTYPES)
def test_addresses_that_wide_loads_cannot_read(dtype):
    tables = rotary_tables(torch.arange(5)[None], 16, 100.0)
    check_beside(
        lambda x: fused_rotary(x.view(1, 5, 4, 16), *tables),
        lambda x: apply_rotary(x.view(1, 5, 4, 16), *tables),
        dtype,
    )


@needs_fused
@pytest.mark.usefixtures("_device")
def test_operators():
    tables = rotary_tables(torch.arange(3)[None], 8, 100.0)
    opcheck("rotary", torch.randn(2, 3, 4, 8, requires_grad=True), *tables, False)
