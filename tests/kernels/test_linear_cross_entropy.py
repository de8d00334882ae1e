"""Cross entropy of a linear head in chunks, against all logits; its kernels are those of test_cross_entropy.py."""

import pytest
import torch
import torch.nn.functional as F
from kernels.fused import TOLERANCE, leaf, needs_fused
from torch.utils.flop_counter import FlopCounterMode

from megalm.kernels.linear_cross_entropy import linear_cross_entropy, summed_linear_cross_entropy

pytestmark = [needs_fused, pytest.mark.usefixtures("_device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_chunked_linear_cross_entropy(fused, dtype):
    x, weight, labels = leaf(7, 16, dtype=dtype), leaf(50, 16, dtype=dtype), torch.randint(0, 45, (7,))
    scale = torch.rand(7)
    losses = linear_cross_entropy(x, weight, labels, 45, chunk=12, fused=fused)
    (losses * scale).sum().backward()
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    logits = exact_x @ exact_weight[:45].t()
    expected = F.cross_entropy(logits, labels, reduction="none")
    (expected * scale).sum().backward()
    tolerance = 20 * TOLERANCE[dtype] if dtype == torch.float32 else 4 * TOLERANCE[dtype]
    torch.testing.assert_close(losses.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("least_rows", [2, 3, 256])
def test_summed_linear_cross_entropy(fused, dtype, least_rows, monkeypatch):
    monkeypatch.setattr("megalm.kernels.linear_cross_entropy._LEAST_ROWS", least_rows)
    x, weight, labels = leaf(7, 16, dtype=dtype), leaf(50, 16, dtype=dtype), torch.randint(0, 45, (7,))
    scale = torch.rand(7)
    scale[2] = 0  # a masked token
    loss = summed_linear_cross_entropy(x, weight, labels, scale, 45, chunk=12, fused=fused)
    (2 * loss).backward()
    single_x, single_weight = (t.detach().clone().requires_grad_() for t in (x, weight))
    single = linear_cross_entropy(single_x, single_weight, labels, 45, fused=fused)
    expected = (single * scale).sum()
    (2 * expected).backward()
    tolerance = 20 * TOLERANCE[dtype] if dtype == torch.float32 else 4 * TOLERANCE[dtype]
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad, single_x.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(weight.grad, single_weight.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("needs_x", "needs_weight"), [(True, False), (False, True), (False, False)])
def test_summed_linear_cross_entropy_computes_the_gradients_that_are_wanted(needs_x, needs_weight):
    x, weight = torch.randn(5, 8, requires_grad=needs_x), torch.randn(20, 8, requires_grad=needs_weight)
    labels, scale = torch.randint(0, 20, (5,)), torch.full((5,), 0.2)
    loss = summed_linear_cross_entropy(x, weight, labels, scale, fused=True)
    torch.testing.assert_close(loss, F.cross_entropy(x @ weight.t(), labels).detach(), check_dtype=False)
    assert loss.requires_grad == (needs_x or needs_weight)
    if loss.requires_grad:
        loss.backward()
    assert (x.grad is not None, weight.grad is not None) == (needs_x, needs_weight)
    empty = summed_linear_cross_entropy(x[:0], weight, labels[:0], scale[:0], fused=True)
    assert empty.item() == 0
    with torch.no_grad(), FlopCounterMode(display=False) as products:
        summed_linear_cross_entropy(x, weight, labels, scale, fused=True)
    assert products.get_total_flops() == 2 * x.numel() * len(weight)
    with pytest.raises(RuntimeError, match=r"token weights \(1,\) must be one for each of 5 labels"):
        summed_linear_cross_entropy(x, weight, labels, scale[:1])
    with pytest.raises(RuntimeError, match=r"labels must lie in \[0, 19\)"):
        summed_linear_cross_entropy(x, weight, torch.full((5,), 19), scale, 19)


@pytest.mark.parametrize("fused", [False, True])
def test_small_token_weights_have_their_gradients_in_float16(fused, monkeypatch):
    monkeypatch.setattr("megalm.kernels.linear_cross_entropy._LEAST_ROWS", 16)
    x, weight = leaf(64, 16, dtype=torch.float16), leaf(500, 16, dtype=torch.float16, scale=0.1)
    labels, token_weight, loss_scale = torch.randint(0, 500, (64,)), 2.0**-16, 2.0**16
    weights = torch.full((64,), token_weight)
    (loss_scale * summed_linear_cross_entropy(x, weight, labels, weights, chunk=32, fused=fused)).backward()
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    losses = F.cross_entropy(exact[0] @ exact[1].t(), labels, reduction="sum")
    (loss_scale * token_weight * losses).backward()
    for found, expected in zip((x, weight), exact, strict=True):
        assert (found.grad.double() - expected.grad).norm() < 2e-3 * expected.grad.norm()
