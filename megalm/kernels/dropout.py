"""residual + dropout(x + bias), with a mask that follows from a seed and is never stored."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.kernels.support import fused_takes, wide


def bias_dropout_add(x: Tensor, bias: Tensor | None, residual: Tensor, probability: float, training: bool) -> Tensor:
    """residual + dropout(x + bias); shape and dtype of `x`. `bias` has shape (x.shape[-1],).

    Draws from torch's default generator of the device. Source of dropout: Srivastava et al. 2014.
    """
    branch = x if bias is None else x + bias.to(x.dtype)
    return residual + F.dropout(branch, probability, training)


def fused_bias_dropout_add(
    x: Tensor, bias: Tensor | None, residual: Tensor, probability: float, training: bool
) -> Tensor:
    """`bias_dropout_add` in one pass, rounded once; another mask than the reference's, from Philox (ten rounds).

    One number of torch's default generator seeds the mask, so that a recomputed forward draws the same one.
    """
    if not fused_takes(x) or x.dtype != residual.dtype:
        return bias_dropout_add(x, bias, residual, probability, training)
    probability = probability if training else 0.0
    if probability > 0:
        seed = torch.randint(2**62, (1,), device=x.device)
    else:
        seed = torch.zeros(1, dtype=torch.int64, device=x.device)
    y: Tensor = torch.ops.megalm.bias_dropout_add(x, wide(bias), residual, seed, probability)
    return y


def register() -> None:
    """Fake implementations and gradient."""
    torch.library.register_fake(
        "megalm::bias_dropout_add", lambda x, bias, residual, seed, probability: x.new_empty(x.shape)
    )
    torch.library.register_fake("megalm::dropout_backward", lambda grad, seed, probability: grad.new_empty(grad.shape))
    torch.library.register_autograd("megalm::bias_dropout_add", _backward, setup_context=_setup)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, _, seed, ctx.probability = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    branch = torch.ops.megalm.dropout_backward(grad, seed, ctx.probability) if ctx.probability > 0 else grad
    grad_bias = branch.flatten(0, -2).sum(0, dtype=torch.float32) if ctx.has_bias else None
    return branch, grad_bias, grad, None, None
