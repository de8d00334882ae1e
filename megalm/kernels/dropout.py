"""residual + dropout(x), with a mask that follows from a seed and is never stored."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.kernels.self_test import Check, Numbers, with_gradient
from megalm.kernels.support import fused_takes

WHOLE = (0, 1)
"""The only part of a tensor that is dropped on its own."""


def dropout_add(x: Tensor, residual: Tensor | None, probability: float, part: tuple[int, int] = WHOLE) -> Tensor:
    """residual + dropout(x); shape and dtype of `x`.

    `part` (number, count): x is that one of `count` equal parts along dim 1 of a tensor (B, T, D), and gets its part of
    the mask of the whole. Draws from torch's default generator of the device. Source: Srivastava et al. 2014.
    """
    number, count = part
    if count == 1:
        dropped = F.dropout(x, probability)
    else:
        B, T, D = x.shape
        scales = F.dropout(x.new_ones(B, T * count, D), probability)
        # a copy: a view would keep the whole mask until the backward pass
        dropped = x * scales[:, number * T : (number + 1) * T].clone()
    return dropped if residual is None else residual + dropped


def fused_dropout_add(x: Tensor, residual: Tensor | None, probability: float, part: tuple[int, int] = WHOLE) -> Tensor:
    """`dropout_add` in one pass, rounded once; another mask than the reference's, from Philox (ten rounds).

    One number of torch's default generator seeds the mask, so that a recomputed forward draws the same one.
    """
    if not fused_takes(x) or (residual is not None and x.dtype != residual.dtype):
        return dropout_add(x, residual, probability, part)
    seed = torch.randint(2**62, (1,), device=x.device)
    number, count = part
    run = max(1, x.shape[1] if count > 1 else x.numel() // max(1, x.shape[-1]))
    y: Tensor = torch.ops.megalm.dropout_add(x, residual, seed, probability, run, run * count, run * number)
    return y


def register() -> None:
    """Fake implementation and gradient."""
    torch.library.register_fake("megalm::dropout_add", lambda x, *_: x.new_empty(x.shape))
    torch.library.register_autograd("megalm::dropout_add", _backward, setup_context=_setup)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, residual, seed, *ctx.options = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    branch = torch.ops.megalm.dropout_add(grad, None, seed, *ctx.options)
    return branch, grad if ctx.has_residual else None, None, None, None, None, None


def check_dropout(numbers: Numbers, cols: int) -> tuple[Tensor, Tensor]:
    """What is kept, as the reference scales it; the masks differ."""
    x = numbers(3, cols)
    return with_gradient(lambda x: fused_dropout_add(x, x, 0.0), x), with_gradient(lambda x: dropout_add(x, x, 0.0), x)


CHECKS: tuple[Check, ...] = (check_dropout,)
