"""Boxes of tensors of up to four dims: pure arithmetic, told by what they index."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalm.distributed.shards import Box, ShardSpec

SHAPES = st.lists(st.integers(1, 4), max_size=4).map(tuple)


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(math.prod(shape)).view(shape)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    """A box of a tensor, perhaps empty."""
    box = Box.whole(shape)
    for dim, size in enumerate(shape):
        start, stop = sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size))))
        box = box.narrow(dim, start, stop)
    return box


@given(st.data(), SHAPES)
def test_the_boxes_of_a_range_are_its_elements_in_order(data: st.DataObject, shape: tuple[int, ...]) -> None:
    box, whole = data.draw(boxes(shape)), numbered(shape)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, box.numel), st.integers(0, box.numel))))
    expected = whole[box.index()].flatten()[start:stop]
    pieces = list(box.of_range(start, stop))
    found = [whole[piece.index()].flatten() for _, piece in pieces]
    assert torch.equal(torch.cat([*found, expected[:0]]), expected)
    assert [offset for offset, _ in pieces] == [sum(map(len, found[:number])) for number in range(len(found))]
    assert len(pieces) <= max(1, 2 * len(shape) - 1)
    assert all(piece.numel > 0 for _, piece in pieces)


@given(st.data(), SHAPES)
def test_an_intersection_is_what_both_index(data: st.DataObject, shape: tuple[int, ...]) -> None:
    one, other, whole = data.draw(boxes(shape)), data.draw(boxes(shape)), numbered(shape)
    common = one.intersection(other)
    expected = set(whole[one.index()].flatten().tolist()) & set(whole[other.index()].flatten().tolist())
    assert common == other.intersection(one)
    assert common.numel == len(expected)
    if common.numel:
        assert set(whole[common.index()].flatten().tolist()) == expected
        assert torch.equal(whole[one.index()][common.index(one)], whole[common.index()])


@given(st.data(), SHAPES)
def test_strides_and_span_find_a_box_in_another_laid_flat(data: st.DataObject, shape: tuple[int, ...]) -> None:
    outer, whole = data.draw(boxes(shape)), numbered(shape)
    inner = data.draw(boxes(outer.sizes))
    inner = Box(tuple(a + b for a, b in zip(inner.offsets, outer.offsets, strict=True)), inner.sizes)
    if inner.numel:
        first, last = outer.span(inner)
        flat = whole[outer.index()].flatten()[first:last]
        assert torch.equal(flat.as_strided(inner.sizes, outer.strides), whole[inner.index()])
        assert (flat[0], flat[-1]) == (whole[inner.index()].min(), whole[inner.index()].max())


@given(SHAPES, st.integers(0, 3))
def test_a_parameter_with_padding_begins_with_its_box(shape: tuple[int, ...], padding: int) -> None:
    whole = numbered(shape) + 1
    local = (shape[0] + padding, *shape[1:]) if shape else shape
    value = ShardSpec.of_whole(shape).cut(whole, local)
    assert value.shape == local
    assert torch.equal(value.flatten()[: whole.numel()], whole.flatten())
    assert not value.flatten()[whole.numel() :].any()


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_any_dim_of_the_weights_of_experts_can_be_cut(dim: int) -> None:
    whole, shape = numbered((2, 4, 6)), (2, 4, 6)
    half = shape[dim] // 2
    halves = [ShardSpec.of_dim(shape, dim, start, start + half) for start in (0, half)]
    parts = [spec.cut(whole, spec.box.sizes) for spec in halves]
    assert torch.equal(torch.cat(parts, dim), whole)


def test_what_is_elsewhere_is_nothing() -> None:
    spec = ShardSpec.elsewhere((3, 4))
    assert (spec.shape, spec.box.numel, spec.is_owner) == ((3, 4), 0, False)


def test_a_scalar_is_one_element() -> None:
    box = Box.whole(())
    assert (box.numel, list(box.of_range(0, 1)), list(box.of_range(0, 0))) == (1, [(0, box)], [])
