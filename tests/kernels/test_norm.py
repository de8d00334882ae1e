"""Norms against float64 formulas, in every dtype; the fused ones against the references."""

import pytest
import torch
from kernels.fused import DTYPES, TOLERANCE, check, check_beside, leaf, needs_fused, on_copies, opcheck

from megalm.kernels.norm import (
    fused_layer_norm,
    fused_layer_norm_after_add,
    fused_rms_norm,
    fused_rms_norm_after_add,
    layer_norm,
    layer_norm_after_add,
    rms_norm,
    rms_norm_after_add,
)

SHAPES = [(1, 1), (3, 7), (2, 5, 64)]
# of a row a GPU's thread holds 1 or 2 packs of 16 bytes in the backward, or none: in float32 that is the second
FUSED_SHAPES = [*SHAPES, (4, 33), (0, 8), (67, 129), (3, 520), (2, 6200), (2, 3000)]


def layer_norm_float64(x, weight, bias, epsilon):
    x, weight, bias = x.double(), weight.double(), bias.double()
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + epsilon).sqrt() * weight + bias


def rms_norm_float64(x, weight, epsilon):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight.double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_norms_match_float64_up_to_one_rounding(shape, dtype, tolerance, weight_dtype):
    # A large mean makes statistics in bfloat16 useless.
    x = (torch.randn(shape) + 30).to(dtype)
    weight, bias = torch.randn(shape[-1]).to(weight_dtype), torch.randn(shape[-1]).to(weight_dtype)
    for result, expected in [
        (layer_norm(x, weight, bias, 1e-5), layer_norm_float64(x, weight, bias, 1e-5)),
        (rms_norm(x, weight, 1e-6), rms_norm_float64(x, weight, 1e-6)),
    ]:
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=20 * 2e-6)


def test_norm_gradients_match_finite_differences():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, w, b: layer_norm(x, w, b, 1e-5), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, weight))


@on_copies(shape=FUSED_SHAPES, dtype=DTYPES)
def test_fused_norms(shape, dtype):
    x, residual = leaf(*shape, dtype=dtype), leaf(*shape, dtype=dtype)
    weight, bias = leaf(shape[-1]), leaf(shape[-1])
    # a row of one element has no variance: its gradient is a difference of rounding errors over sqrt(epsilon)
    epsilon = 1e-2 if shape[-1] < 4 else 1e-5
    loose = 20 * TOLERANCE[torch.float32] if dtype == torch.float32 else None
    check(
        lambda x, w: fused_rms_norm(x, w, epsilon), lambda x, w: rms_norm(x, w, epsilon), (x, weight), tolerance=loose
    )
    x.grad = weight.grad = None
    check(
        lambda x, w, b: fused_layer_norm(x, w, b, epsilon),
        lambda x, w, b: layer_norm(x, w, b, epsilon),
        (x, weight, bias),
        tolerance=loose,
    )
    for fused, reference, arguments in [
        (fused_rms_norm_after_add, rms_norm_after_add, (weight,)),
        (fused_layer_norm_after_add, layer_norm_after_add, (weight, bias)),
    ]:
        with torch.no_grad():
            _, total = fused(x, residual, *arguments, epsilon)
        assert torch.equal(total, x + residual)
        # x + x is exact: the sum is rounded before it is normalized, float64 would not
        inputs = [t.detach().clone().requires_grad_() for t in (x, x, *arguments)]
        check(lambda *a, f=fused: f(*a, epsilon), lambda *a, f=reference: f(*a, epsilon), inputs, tolerance=loose)


@on_copies(dtype=[torch.float32, torch.bfloat16])
def test_rows_wider_than_a_team_of_threads_holds(dtype):
    """On GPUs these take loops that narrower rows leave out."""
    loose = 20 * TOLERANCE[torch.float32] if dtype == torch.float32 else None
    x, weight, bias = leaf(2, 16400, dtype=dtype), leaf(16400), leaf(16400)
    check(lambda *a: fused_layer_norm(*a, 1e-5), lambda *a: layer_norm(*a, 1e-5), (x, weight, bias), tolerance=loose)


@on_copies()
def test_norms_of_a_large_mean_and_of_strided_heads():
    x = (torch.randn(2, 3, 4, 16) + 30).bfloat16()
    wide = torch.randn(2, 3, 12, 16).bfloat16()
    weight, bias = torch.randn(16), torch.randn(16)
    for value in (x, wide[:, :, 4:8], wide.transpose(1, 2)):
        expected = layer_norm(value.double(), weight.double(), bias.double(), 1e-5)
        result = fused_layer_norm(value, weight, bias, 1e-5)
        torch.testing.assert_close(result.double(), expected, rtol=2**-8, atol=1e-4)


@on_copies(dtype=DTYPES)
def test_addresses_that_wide_loads_cannot_read(dtype):
    weight = torch.rand(64)
    check_beside(
        lambda x: fused_layer_norm(x, weight, weight, 1e-5), lambda x: layer_norm(x, weight, weight, 1e-5), dtype
    )


@needs_fused
@pytest.mark.usefixtures("_device")
def test_operators():
    x, y = (torch.randn(2, 3, 8, requires_grad=True) for _ in range(2))
    weight = torch.randn(8, requires_grad=True)
    opcheck("norm", x, None, weight, weight, 1e-5)
    opcheck("norm", x, y, weight, None, 1e-5)
    plain = [t.detach().clone() for t in (y, x, weight)]
    opcheck("norm_backward", plain[0], None, *plain[1:], torch.zeros(6), torch.ones(6), True)
