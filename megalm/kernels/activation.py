"""Activations of the MLP. All keep the shape and dtype of their input and are computed in float32 inside."""

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.kernels.self_test import Check, Numbers, with_gradient
from megalm.kernels.support import fused_takes


class Activation(IntEnum):
    """Numbers of the activations in the fused operator (csrc/activation.h)."""

    GELU = 0
    GELU_TANH = 1
    SQUARED_RELU = 2


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x), Phi the normal distribution function. Source: Hendrycks and Gimpel 2016, arXiv:1606.08415."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), the approximation that GPT-2 was trained with.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2.
    """
    return F.gelu(x, approximate="tanh")


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2. Source: So et al. 2021, "Primer", arXiv:2109.08668."""
    return F.relu(x).square()


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up, elementwise over equal shapes. Source: Shazeer 2020, arXiv:2002.05202, equation 6."""
    return F.silu(gate) * up


REFERENCES: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.GELU: gelu,
    Activation.GELU_TANH: gelu_tanh,
    Activation.SQUARED_RELU: squared_relu,
}


def fused_activation(x: Tensor, kind: Activation) -> Tensor:
    """The activation in one pass, whose backward keeps nothing but x."""
    if not fused_takes(x):
        return REFERENCES[kind](x)
    y: Tensor = torch.ops.megalm.activation(x, int(kind))
    return y


def fused_gelu(x: Tensor) -> Tensor:
    """`gelu`."""
    return fused_activation(x, Activation.GELU)


def fused_gelu_tanh(x: Tensor) -> Tensor:
    """`gelu_tanh`."""
    return fused_activation(x, Activation.GELU_TANH)


def fused_squared_relu(x: Tensor) -> Tensor:
    """`squared_relu`."""
    return fused_activation(x, Activation.SQUARED_RELU)


def fused_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` in one pass; silu(gate) is not rounded in between and not stored for the backward."""
    if not fused_takes(gate):
        return swiglu(gate, up)
    y: Tensor = torch.ops.megalm.swiglu(gate, up)
    return y


def register() -> None:
    """Fake implementations and gradients."""
    library = torch.library
    library.register_fake("megalm::swiglu", lambda gate, up: _like(gate))
    library.register_fake("megalm::swiglu_backward", lambda grad, gate, up: (_like(gate), _like(gate)))
    library.register_autograd("megalm::swiglu", _swiglu_backward, setup_context=_swiglu_setup)
    library.register_fake("megalm::activation", lambda x, kind: _like(x))
    library.register_fake("megalm::activation_backward", lambda grad, x, kind: _like(x))
    library.register_autograd("megalm::activation", _activation_backward, setup_context=_activation_setup)


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _swiglu_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = torch.ops.megalm.swiglu_backward(grad, *ctx.saved_tensors)
    return grad_gate, grad_up


def _activation_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.kind = inputs
    ctx.save_for_backward(x)


def _activation_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.megalm.activation_backward(grad, *ctx.saved_tensors, ctx.kind), None


def check_swiglu(numbers: Numbers, cols: int) -> tuple[Tensor, Tensor]:
    """With its gradient."""
    x, up = numbers(3, cols), numbers(3, cols)
    return with_gradient(lambda x: fused_swiglu(x, up), x), with_gradient(lambda x: swiglu(x, up), x)


def check_gelu(numbers: Numbers, cols: int) -> tuple[Tensor, Tensor]:
    """With its gradient."""
    x = numbers(3, cols)
    return with_gradient(fused_gelu, x), with_gradient(gelu, x)


CHECKS: tuple[Check, ...] = (check_swiglu, check_gelu)
