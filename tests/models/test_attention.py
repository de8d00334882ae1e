"""Attention alone: against the formula written out, and with fewer heads than the configuration says."""

import math

import pytest
import torch
from torch import nn

from megalm.models.blocks.attention import Attention, CausalAttention


def attention_float64(q_BTHC, k_BSGC, v_BSGC):
    q, k, v = (t.double() for t in (q_BTHC, k_BSGC, v_BSGC))
    repeats = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    scores = torch.einsum("bthc,bshc->bhts", q, k) / math.sqrt(q.shape[-1])
    T, S = scores.shape[-2:]
    hidden = torch.arange(S)[None] > torch.arange(S - T, S)[:, None]
    return torch.einsum("bhts,bshc->bthc", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 7), (3, 7), (1, 1)])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_core_matches_the_formula(queries, keys, groups, dtype, tolerance):
    q = torch.randn(2, queries, 4, 8).to(dtype)
    k, v = torch.randn(2, keys, groups, 8).to(dtype), torch.randn(2, keys, groups, 8).to(dtype)
    result = CausalAttention(dropout=0.0)(q, k, v)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), attention_float64(q, k, v), rtol=tolerance, atol=tolerance)


def test_heads_come_from_the_projections_and_not_from_the_configuration(config_of):
    config = config_of("qwen")  # 4 query heads, 2 groups, head width 8
    whole = Attention(config)
    x = torch.randn(2, 5, 32)
    parts = []
    for rank in range(2):  # as two column-parallel ranks would hold it
        part = Attention(config)
        part.load_state_dict(whole.state_dict())
        for name, width in [("wq", 16), ("wk", 8), ("wv", 8)]:
            linear = nn.Linear(32, width)
            linear.weight = nn.Parameter(getattr(whole, name).weight[rank * width : (rank + 1) * width])
            linear.bias = nn.Parameter(getattr(whole, name).bias[rank * width : (rank + 1) * width])
            setattr(part, name, linear)
        part.wo = nn.Linear(16, 32, bias=False)
        part.wo.weight = nn.Parameter(whole.wo.weight[:, rank * 16 : (rank + 1) * 16])
        parts.append(part(x))
    torch.testing.assert_close(sum(parts), whole(x))


@pytest.mark.parametrize("window", [0, 1, 5, 70])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("length", "queries"), [(150, 150), (64, 64), (90, 7), (90, 1)])
def test_windows_and_soft_caps_match_the_formula(window, softcap, length, queries):
    """Over several blocks of the window, over part of one, and for a few queries after a cache."""
    q = torch.randn(2, queries, 4, 8, requires_grad=True)
    k, v = (torch.randn(2, length, 2, 8, requires_grad=True) for _ in "kv")
    found = CausalAttention(0.0, window=window, softcap=softcap, scale=0.5)(q, k, v)
    positions = torch.arange(length - queries, length)[:, None] - torch.arange(length)
    scores = torch.einsum("bthc,bshc->bhts", q, k.repeat_interleave(2, 2)) * 0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill((positions < 0) | (positions > window), float("-inf")).softmax(-1)
    expected = torch.einsum("bhts,bshc->bthc", weights, v.repeat_interleave(2, 2))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
