"""Attention inside documents: equal to a dense mask in values and gradients, in the core and in whole models."""

import math
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megalm.config.model import ModelConfig
from megalm.config.recompute import RecomputeConfig
from megalm.models.blocks.attention import CausalAttention
from megalm.models.blocks.documents import Documents, document_attention, takes_varlen
from megalm.models.gpt.model import GPT
from megalm.parallel.recompute import apply_recompute
from megalm.testing.batches import token_losses

T = 24


def cumulative(layouts: list[list[int]]) -> Tensor:
    """Cumulative lengths (B, T + 1) as the objective gives them."""
    rows = [[0, *accumulate(lengths)] for lengths in layouts]
    return torch.tensor([row + [row[-1]] * (row[-1] + 1 - len(row)) for row in rows], dtype=torch.int32)


def dense_mask(layouts: list[list[int]]) -> Tensor:
    """(B, T, T), True where query t may see key s."""
    blocks = [torch.block_diag(*(torch.ones(length, length) for length in lengths)) for lengths in layouts]
    return torch.stack(blocks).bool() & torch.ones(blocks[0].shape).bool().tril()


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The formula in float64 with a mask (B, T, T)."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bthc,bshc->bhts", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhts,bshc->bthc", scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1), v)


@st.composite
def layouts(draw: st.DrawFn) -> list[list[int]]:
    """Document lengths of one to three samples, each summing to T."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        cuts = sorted(draw(st.sets(st.integers(1, T - 1), max_size=T - 1)))
        found.append([b - a for a, b in zip([0, *cuts], [*cuts, T], strict=True)])
    return found


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@settings(max_examples=40, deadline=None)
@given(layout=layouts(), seed=st.integers(0, 1000))
def test_core_equals_the_dense_mask(
    groups: int, dtype: torch.dtype, tolerance: float, layout: list[list[int]], seed: int
) -> None:
    torch.manual_seed(seed)
    B = len(layout)
    q, k, v = (torch.randn(B, T, heads, 8).to(dtype).requires_grad_() for heads in (4, groups, groups))
    weight = torch.randn(B, T, 4, 8)
    found = CausalAttention(0.0)(q, k, v, Documents.of_batch(cumulative(layout), q.device))
    assert found.dtype == dtype
    wanted = dense_attention(q, k, v, dense_mask(layout))
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    ours = torch.autograd.grad((found.float() * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((wanted * weight).sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=4 * tolerance, atol=4 * tolerance)


def test_one_document_a_sample_takes_the_plain_path() -> None:
    assert Documents.of_batch(cumulative([[T], [T]]), torch.device("cpu")) is None
    assert Documents.of_batch(cumulative([[T], [T - 1, 1]]), torch.device("cpu")) is not None


@pytest.mark.parametrize("style", ["gpt2", "llama", "qwen", "neox"])
def test_a_packed_sample_is_its_documents_one_by_one(
    style: str, config_of: Callable[..., ModelConfig], build: Callable[..., GPT]
) -> None:
    model = build(config_of(style))
    layout = [[5, 1, 18], [24], [11, 13]]
    tokens, labels = torch.randint(100, (3, T)), torch.randint(100, (3, T))
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in layout])
    packed = token_losses(model, tokens, labels, position_ids=positions, cu_seqlens=cumulative(layout))
    apart = torch.cat([
        token_losses(model, t[None], y[None])[0]
        for row_tokens, row_labels, lengths in zip(tokens, labels, layout, strict=True)
        for t, y in zip(row_tokens.split(lengths), row_labels.split(lengths), strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(packed.flatten(), apart, rtol=1e-4, atol=1e-5)
    joined = token_losses(model, tokens, labels, position_ids=positions)
    assert not torch.allclose(packed, joined, rtol=1e-2), "documents must matter here"
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours = torch.autograd.grad(packed.sum(), parameters)
    theirs = torch.autograd.grad(apart.sum(), parameters)
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_the_cuda_kernel_gets_the_batch_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and arguments of the call, checked by torch's own shape function of the operator."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    layout = [[5, 1, 18], [24]]
    documents = Documents.of_batch(cumulative(layout), torch.device("cpu"))
    assert documents is not None
    assert documents.cu_seqlens.tolist() == [0, 5, 6, 24, 48]
    assert documents.cu_seqlens.dtype == torch.int32
    from torch.nn.attention.varlen import varlen_attn  # it loads torch's compiler

    calls = []

    def counted(*arguments: object, **options: object) -> object:
        calls.append((arguments[5:], options))
        return varlen_attn(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", counted)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k = (torch.empty(2, T, heads, 8, dtype=torch.bfloat16, device="cuda") for heads in (4, 2))
        assert takes_varlen(q, 0.0)
        assert not takes_varlen(q, 0.1)
        assert not takes_varlen(q.float(), 0.0)
        y = document_attention(q, k, k, documents, None)
    assert y.shape == q.shape
    assert calls == [((24, 24), {"window_size": (-1, 0), "enable_gqa": True})]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("groups", [4, 2])
def test_the_cuda_kernel_equals_the_dense_mask(groups: int) -> None:
    layout = [[5, 1, 18], [24], [11, 13]]
    q, k, v = (
        torch.randn(3, T, heads, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for heads in (4, groups, groups)
    )
    weight = torch.randn(3, T, 4, 64, device="cuda")
    documents = Documents.of_batch(cumulative(layout), q.device)
    assert documents is not None
    found = document_attention(q, k, v, documents, None)
    wanted = dense_attention(q, k, v, dense_mask(layout).cuda())
    torch.testing.assert_close(found.double(), wanted, rtol=3e-2, atol=3e-2)
    ours = torch.autograd.grad((found.float() * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((wanted * weight).sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputation_keeps_documents_apart(
    granularity: str, config_of: Callable[..., ModelConfig], build: Callable[..., GPT]
) -> None:
    config = config_of("llama")
    plain, recomputed = build(config), build(config)
    apply_recompute(recomputed, RecomputeConfig(recompute_granularity=granularity))  # type: ignore[arg-type]
    tokens = torch.randint(100, (2, T))
    boundaries = cumulative([[5, 1, 18], [11, 13]])
    losses = []
    for model in (plain, recomputed):
        losses.append(token_losses(model, tokens, tokens, cu_seqlens=boundaries))
        losses[-1].sum().backward()
    assert torch.equal(*losses)
    for one, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)
