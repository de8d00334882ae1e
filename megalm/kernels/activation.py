"""Activations of the MLP. All keep the shape and dtype of their input and are computed in float32 inside."""

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.kernels.support import fused_takes, wide


class Activation(IntEnum):
    """Numbers of the activations in the fused operators (csrc/activation.h)."""

    SILU = 0
    GELU = 1
    GELU_TANH = 2
    SQUARED_RELU = 3


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


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, elementwise over equal shapes. Source: Shazeer 2020, arXiv:2002.05202, equation 6."""
    return F.gelu(gate) * up


REFERENCES: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SILU: F.silu,
    Activation.GELU: gelu,
    Activation.GELU_TANH: gelu_tanh,
    Activation.SQUARED_RELU: squared_relu,
}


def bias_activation(x: Tensor, bias: Tensor | None, kind: Activation) -> Tensor:
    """activation(x + bias); `bias` has shape (x.shape[-1],)."""
    return REFERENCES[kind](x if bias is None else x + bias.to(x.dtype))


def fused_bias_activation(x: Tensor, bias: Tensor | None, kind: Activation) -> Tensor:
    """`bias_activation` in one pass; x + bias is not rounded in between."""
    if not fused_takes(x):
        return bias_activation(x, bias, kind)
    y: Tensor = torch.ops.megalm.bias_activation(x, wide(bias), int(kind))
    return y


def fused_gelu(x: Tensor) -> Tensor:
    """`gelu`."""
    return fused_bias_activation(x, None, Activation.GELU)


def fused_gelu_tanh(x: Tensor) -> Tensor:
    """`gelu_tanh`."""
    return fused_bias_activation(x, None, Activation.GELU_TANH)


def fused_squared_relu(x: Tensor) -> Tensor:
    """`squared_relu`."""
    return fused_bias_activation(x, None, Activation.SQUARED_RELU)


def fused_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` in one pass; silu(gate) is not rounded in between and not stored for the backward."""
    if not fused_takes(gate):
        return swiglu(gate, up)
    y: Tensor = torch.ops.megalm.gated_activation(gate, up, int(Activation.SILU))
    return y


def fused_geglu(gate: Tensor, up: Tensor) -> Tensor:
    """`geglu` in one pass."""
    if not fused_takes(gate):
        return geglu(gate, up)
    y: Tensor = torch.ops.megalm.gated_activation(gate, up, int(Activation.GELU))
    return y


def register() -> None:
    """Fake implementations and gradients."""
    library = torch.library
    library.register_fake("megalm::gated_activation", lambda gate, up, kind: gate.new_empty(gate.shape))
    library.register_fake("megalm::gated_activation_backward", _fake_gated_backward)
    library.register_autograd("megalm::gated_activation", _gated_backward, setup_context=_gated_setup)
    library.register_fake("megalm::bias_activation", lambda x, bias, kind: x.new_empty(x.shape))
    library.register_fake("megalm::bias_activation_backward", _fake_bias_backward)
    library.register_autograd("megalm::bias_activation", _bias_backward, setup_context=_bias_setup)


def _fake_gated_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _fake_bias_backward(grad: Tensor, x: Tensor, bias: Tensor | None, kind: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if bias is None else x.shape[-1], dtype=torch.float32)


def _gated_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.kind = inputs
    ctx.save_for_backward(gate, up)


def _gated_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_gate, grad_up = torch.ops.megalm.gated_activation_backward(grad, *ctx.saved_tensors, ctx.kind)
    return grad_gate, grad_up, None


def _bias_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.kind = inputs
    ctx.save_for_backward(x, bias)


def _bias_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = torch.ops.megalm.bias_activation_backward(grad, x, bias, ctx.kind)
    return grad_x, None if bias is None else grad_bias, None
