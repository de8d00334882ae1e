"""residual + dropout(x + bias), with a mask that follows from a seed and is never stored."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.kernels.support import fused_takes, wide

WHOLE = (0, 1)
"""The only part of a tensor that is dropped on its own."""


def bias_dropout_add(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    probability: float,
    training: bool,
    part: tuple[int, int] = WHOLE,
) -> Tensor:
    """residual + dropout(x + bias); shape and dtype of `x`. `bias` has shape (x.shape[-1],).

    `part` (number, count): x is that one of `count` equal parts along dim 1 of a tensor (B, T, D), and gets its part of
    the mask of the whole. Draws from torch's default generator of the device. Source: Srivastava et al. 2014.
    """
    branch = x if bias is None else x + bias.to(x.dtype)
    number, count = part
    if count == 1 or not training or probability == 0:
        dropped = F.dropout(branch, probability, training)
    else:
        B, T, D = x.shape
        scales = F.dropout(x.new_ones(B, T * count, D), probability)
        # a copy: a view would keep the whole mask until the backward pass
        dropped = branch * scales[:, number * T : (number + 1) * T].clone()
    return dropped if residual is None else residual + dropped


def fused_bias_dropout_add(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    probability: float,
    training: bool,
    part: tuple[int, int] = WHOLE,
) -> Tensor:
    """`bias_dropout_add` in one pass, rounded once; another mask than the reference's, from Philox (ten rounds).

    One number of torch's default generator seeds the mask, so that a recomputed forward draws the same one.
    """
    if not fused_takes(x) or (residual is not None and x.dtype != residual.dtype):
        return bias_dropout_add(x, bias, residual, probability, training, part)
    probability = probability if training else 0.0
    if probability > 0:
        seed = torch.randint(2**62, (1,), device=x.device)
    else:
        seed = torch.zeros(1, dtype=torch.int64, device=x.device)
    number, count = part
    run = max(1, x.shape[1] if count > 1 else x.numel() // max(1, x.shape[-1]))
    y: Tensor = torch.ops.megalm.bias_dropout_add(
        x, wide(bias), residual, seed, probability, run, run * count, run * number
    )
    return y


def register() -> None:
    """Fake implementation and gradient."""
    torch.library.register_fake("megalm::bias_dropout_add", lambda x, *_: x.new_empty(x.shape))
    torch.library.register_autograd("megalm::bias_dropout_add", _backward, setup_context=_setup)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, residual, seed, ctx.probability, *ctx.rows = inputs
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    ctx.save_for_backward(seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    branch = grad
    if ctx.probability > 0:
        branch = torch.ops.megalm.bias_dropout_add(grad, None, None, seed, ctx.probability, *ctx.rows)
    grad_bias = branch.flatten(0, -2).sum(0, dtype=torch.float32) if ctx.has_bias else None
    return branch, grad_bias, grad if ctx.has_residual else None, None, None, None, None, None
