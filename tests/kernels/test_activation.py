"""Activations against their formulas in float64."""

import math

import pytest
import torch

from megalm.kernels.activation import gelu, gelu_tanh, squared_relu, swiglu

FORMULAS = {
    gelu: lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    gelu_tanh: lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    squared_relu: lambda x: torch.where(x > 0, x * x, 0.0),
}


@pytest.mark.parametrize("activation", FORMULAS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
def test_activation_matches_its_formula(activation, dtype, tolerance):
    x = torch.linspace(-6, 6, 101).to(dtype)
    result = activation(x)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), FORMULAS[activation](x.double()), rtol=tolerance, atol=tolerance)


def test_swiglu_applies_silu_to_the_gate_only():
    gate, up = torch.randn(2, 7, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64)
    torch.testing.assert_close(swiglu(gate, up), gate / (1 + torch.exp(-gate)) * up)
    assert not torch.allclose(swiglu(gate, up), swiglu(up, gate))
