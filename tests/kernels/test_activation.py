"""Activations against their formulas in float64."""

import math

import pytest
import torch
from kernels.fused import DTYPES, TOLERANCE, beside, check, check_beside, leaf, needs_fused, on_copies, opcheck

from megalm.kernels.activation import (
    REFERENCES,
    Activation,
    fused_activation,
    fused_gelu_tanh,
    fused_swiglu,
    gelu,
    gelu_tanh,
    squared_relu,
    swiglu,
)

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


@on_copies(shape=[(1, 1), (3, 7), (2, 5, 64), (4, 33), (0, 8), (67, 129)], dtype=DTYPES)
def test_fused_swiglu(shape, dtype):
    check(fused_swiglu, swiglu, (leaf(*shape, dtype=dtype, scale=3.0), leaf(*shape, dtype=dtype)))


@on_copies(shape=[(3, 5), (67, 37), (67, 264)], kind=list(Activation), dtype=DTYPES)
def test_fused_activations(shape, kind, dtype):
    x = leaf(*shape, dtype=dtype, scale=3.0)
    check(lambda x: fused_activation(x, kind), REFERENCES[kind], (x,), tolerance=max(TOLERANCE[dtype], 5e-6))


@on_copies()
def test_activations_far_from_zero_and_of_halves_of_one_product():
    x = torch.tensor([-100.0, -30.0, -10.0, 30.0, 100.0, 1e15, -1e15])
    for kind in Activation:
        torch.testing.assert_close(
            fused_activation(x, kind).double(), REFERENCES[kind](x.double()), rtol=1e-5, atol=1e-7
        )
    product = torch.randn(3, 4, 2 * 40).bfloat16()
    gate, up = product.chunk(2, dim=-1)
    torch.testing.assert_close(fused_swiglu(gate, up), swiglu(gate.float(), up.float()).bfloat16())
    torch.testing.assert_close(fused_gelu_tanh(gate), gelu_tanh(gate.float()).bfloat16())


@on_copies(dtype=DTYPES)
def test_addresses_that_wide_loads_cannot_read(dtype):
    up = beside(5, 64, dtype=dtype)
    check_beside(lambda x: fused_swiglu(x, up), lambda x: swiglu(x, up), dtype)
    check_beside(fused_gelu_tanh, gelu_tanh, dtype)


@needs_fused
@pytest.mark.usefixtures("_device")
def test_operators():
    x, y, grad = (torch.randn(2, 3, 8, requires_grad=True) for _ in range(3))
    opcheck("swiglu", x, y)
    opcheck("swiglu_backward", *(t.detach().clone() for t in (grad, x, y)))
    opcheck("activation", x, 1)
    opcheck("activation_backward", grad.detach(), x.detach(), 2)
