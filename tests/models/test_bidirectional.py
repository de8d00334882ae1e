"""Attention of encoders against scores with a mask, whatever way is taken for the length."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.models.blocks.bidirectional import BidirectionalAttention, Padding
from megalm.models.blocks.documents import Documents

HEADS, GROUPS, WIDTH = 4, 2, 8


def masked(q, k, v, visible):
    """softmax(q k^T / sqrt(C)) v by its formula; `visible` (B, T, T)."""
    k, v = (x.repeat_interleave(HEADS // GROUPS, dim=2) for x in (k, v))
    scores = torch.einsum("bthc,bshc->bhts", q, k) / WIDTH**0.5
    weights = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshc->bthc", weights, v)


def tensors(B, T):
    generator = torch.Generator().manual_seed(T)
    shapes = [(B, T, HEADS, WIDTH), (B, T, GROUPS, WIDTH), (B, T, GROUPS, WIDTH)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def in_window(T, window):
    ahead = torch.arange(T) - torch.arange(T)[:, None]
    return torch.ones(T, T, dtype=torch.bool) if window is None else (ahead >= -window[0]) & (ahead <= window[1])


def check(attention, within, visible, T, real=None):
    first, second = tensors(2, T), tensors(2, T)
    real = torch.ones(2, T, dtype=torch.bool) if real is None else real
    found, expected = attention(*first, within)[real], masked(*second, visible)[real]
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@given(st.integers(1, 420), st.none() | st.tuples(st.integers(0, 70), st.integers(0, 70)))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_window_is_a_mask(T, window):
    """Short sequences by one mask, long ones block by block."""
    visible = in_window(T, window).expand(2, T, T)
    check(BidirectionalAttention(0.0, window=window), None, visible, T)


@pytest.mark.parametrize("window", [None, (3, 2)])
@pytest.mark.parametrize("T", [12, 300])
def test_padding_and_other_texts_are_not_seen(T, window):
    attention, near = BidirectionalAttention(0.0, window=window), in_window(T, window)
    ends = [5, T - 4]
    number = sum((torch.arange(T) >= end).long() for end in ends)
    same = number[:, None] == number
    cu_seqlens = torch.tensor([[0, *ends] + [T] * (T - 2)] * 2)
    check(attention, Documents.of_batch(cu_seqlens, torch.device("cpu")), (near & same).expand(2, T, T), T)
    real = torch.ones(2, T, dtype=torch.bool)
    real[0, :5], real[1, -4:] = False, False
    check(attention, Padding(real), (near & real[:, None, :]) | torch.eye(T, dtype=torch.bool), T, real)
