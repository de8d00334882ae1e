"""Cross entropy of a linear head in chunks, against all logits; its kernels are those of test_cross_entropy.py."""

import pytest
import torch
import torch.nn.functional as F
from kernels.fused import TOLERANCE, leaf, needs_fused
from torch.utils.flop_counter import FlopCounterMode

from megalm.kernels import linear_cross_entropy as module
from megalm.kernels.linear_cross_entropy import linear_cross_entropy

pytestmark = pytest.mark.usefixtures("_device")
BOTH = pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_fused)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@BOTH
def test_chunked_linear_cross_entropy(fused, has_bias, dtype):
    x, weight, labels = leaf(7, 16, dtype=dtype), leaf(50, 16, dtype=dtype), torch.randint(0, 45, (7,))
    bias = leaf(50, dtype=dtype) if has_bias else None
    scale = torch.rand(7)
    scale[2] = 0  # a masked token
    losses = linear_cross_entropy(x, weight, labels, 45, bias_V=bias, chunk=12, fused=fused)
    (losses * scale).sum().backward()
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    exact_bias = (torch.zeros(50) if bias is None else bias.detach()).double().requires_grad_()
    logits = exact_x @ exact_weight[:45].t() + exact_bias[:45]
    expected = F.cross_entropy(logits, labels, reduction="none")
    (expected * scale).sum().backward()
    tolerance = 20 * TOLERANCE[dtype] if dtype == torch.float32 else 4 * TOLERANCE[dtype]
    torch.testing.assert_close(losses.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=tolerance, atol=tolerance)
    assert not x.grad[2].any()
    assert not weight.grad[45:].any(), "rows of padding have no gradient"
    if bias is not None:
        torch.testing.assert_close(bias.grad.double(), exact_bias.grad, rtol=tolerance, atol=tolerance)
        assert not bias.grad[45:].any()


def test_a_label_that_is_no_class_gives_nan():
    x, weight = leaf(4, 8), leaf(20, 8)
    losses = linear_cross_entropy(x, weight, torch.tensor([0, 18, 19, -1]), 19)
    assert losses.isnan().tolist() == [False, False, True, True]


@pytest.mark.parametrize(("needs_x", "needs_weight"), [(True, False), (False, True), (True, True)])
def test_a_backward_pass_computes_the_gradients_that_are_wanted(needs_x, needs_weight):
    leaves = torch.randn(5, 8, requires_grad=needs_x), torch.randn(20, 8, requires_grad=needs_weight)
    losses = linear_cross_entropy(*leaves, torch.randint(0, 20, (5,)), chunk=7)
    with FlopCounterMode(display=False) as products:
        losses.sum().backward()
    assert products.get_total_flops() == (1 + needs_x + needs_weight) * 2 * 5 * 8 * 20
    assert [leaf.grad is not None for leaf in leaves] == [needs_x, needs_weight]


def test_a_backward_pass_in_two_parts_computes_no_product_in_vain():
    """As zero-bubble schedules do: towards the input, then from there towards the weight."""
    x, weight, labels = torch.randn(5, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True), torch.arange(5)
    inner = x * 1  # no leaf, as what comes out of layers
    loss = linear_cross_entropy(inner, weight, labels, chunk=7).sum()
    expected = torch.autograd.grad(loss, (inner, weight), retain_graph=True)
    for wanted, gradient in zip((inner, weight), expected, strict=True):
        with FlopCounterMode(display=False) as products:
            (found,) = torch.autograd.grad(loss, wanted, retain_graph=True)
        assert torch.equal(found, gradient)
        assert products.get_total_flops() == 2 * 2 * 5 * 8 * 20


def test_chunks_have_as_many_columns_as_the_tokens_allow(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "CHUNK_LOGITS", 64)
    monkeypatch.setattr(module, "LEAST_COLUMNS", 4)
    statistics = module.vocabulary_statistics
    monkeypatch.setattr(
        module, "vocabulary_statistics", lambda logits, *rest: seen.append(logits.shape) or statistics(logits, *rest)
    )
    for tokens in (8, 32):
        linear_cross_entropy(torch.randn(tokens, 3), torch.randn(18, 3), torch.arange(tokens) % 18)
    assert seen == [(8, 8), (8, 8), (8, 2), *[(32, 4)] * 4, (32, 2)]
