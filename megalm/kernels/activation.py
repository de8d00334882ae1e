"""Activations of the MLP. All keep the shape and dtype of their input; torch computes them in float32 inside."""

import torch.nn.functional as F
from torch import Tensor


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
