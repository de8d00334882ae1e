"""Norms against float64 formulas, in every dtype."""

import pytest
import torch

from megalm.kernels.norm import layer_norm, rms_norm

SHAPES = [(1, 1), (3, 7), (2, 5, 64)]


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
