"""Layer and root-mean-square normalization of the last dim, with float32 statistics for every input dtype.

Each takes an optional residual that is added to the input first: the result is then (normalized, sum), and the sum is
rounded to the input's dtype before it is normalized, as if it had been computed on its own.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.kernels.self_test import Check, Numbers, with_gradient
from megalm.kernels.support import fused_takes


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias over the last dim; shape and dtype of `x`.

    Mean, variance, scale and shift are computed in float32 and rounded once at the end.
    `weight` and `bias` have shape (x.shape[-1],); their dtype may differ from x's.
    Source: Ba et al. 2016, "Layer Normalization", equation 4.
    """
    if weight.dtype == x.dtype:  # torch's own kernel already keeps float32 inside
        return F.layer_norm(x, weight.shape, weight, bias, epsilon)
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), epsilon).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dim; shape and dtype of `x`.

    The mean square, the division and the scale are computed in float32 and rounded once at the end.
    `weight` has shape (x.shape[-1],); its dtype may differ from x's.
    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
    """
    # through one node, so that x gets one gradient, summed here: the same whether or not the norm is recomputed
    wide = x.view_as(x).to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * inverse * weight.to(wide.dtype)).to(x.dtype)


def layer_norm_after_add(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """(`layer_norm` of the sum x + residual, the sum); None: x is the sum."""
    total = x if residual is None else x + residual
    return layer_norm(total, weight, bias, epsilon), total


def rms_norm_after_add(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(`rms_norm` of the sum x + residual, the sum); None: x is the sum."""
    total = x if residual is None else x + residual
    return rms_norm(total, weight, epsilon), total


def fused_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """`layer_norm`, one pass over memory."""
    if not fused_takes(x):
        return layer_norm(x, weight, bias, epsilon)
    y: Tensor = torch.ops.megalm.norm(x, None, weight.float(), bias.float(), epsilon)[0]
    return y


def fused_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`rms_norm`, one pass over memory."""
    if not fused_takes(x):
        return rms_norm(x, weight, epsilon)
    y: Tensor = torch.ops.megalm.norm(x, None, weight.float(), None, epsilon)[0]
    return y


def fused_layer_norm_after_add(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """`layer_norm_after_add`, one pass over memory."""
    if not fused_takes(x) or (residual is not None and x.dtype != residual.dtype):
        return layer_norm_after_add(x, residual, weight, bias, epsilon)
    return _norm_after_add(x, residual, weight.float(), bias.float(), epsilon)


def fused_rms_norm_after_add(
    x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """`rms_norm_after_add`, one pass over memory."""
    if not fused_takes(x) or (residual is not None and x.dtype != residual.dtype):
        return rms_norm_after_add(x, residual, weight, epsilon)
    return _norm_after_add(x, residual, weight.float(), None, epsilon)


def _norm_after_add(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    if residual is None:
        apply: Callable[..., tuple[Tensor, Tensor]] = _NormOfSum.apply
        return apply(x, weight, bias, epsilon)
    y, total, _, _ = torch.ops.megalm.norm(x, residual, weight, bias, epsilon)
    return y, total


class _NormOfSum(torch.autograd.Function):
    """Forward: (norm of the sum, the sum itself). Backward: both gradients in one pass, as where the sum is made."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
        y, _, mean, rstd = torch.ops.megalm.norm(total, None, weight, bias, epsilon)
        ctx.center, ctx.has_residual = bias is not None, True
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_total, _, grad_weight, grad_bias, *rest = _backward(ctx, *grads)
        return grad_total, grad_weight, grad_bias, *rest


def register() -> None:
    """Fake implementations and gradient."""
    torch.library.register_fake("megalm::norm", _fake)
    torch.library.register_fake("megalm::norm_backward", _fake_backward)
    torch.library.register_autograd("megalm::norm", _backward, setup_context=_setup)


def _fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = math.prod(x.shape[:-1])
    total = x.new_empty(x.shape if residual is not None else (0,))
    mean = x.new_empty(0 if bias is None else rows, dtype=torch.float32)
    return x.new_empty(x.shape), total, mean, x.new_empty(rows, dtype=torch.float32)


def _fake_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    width = x.shape[-1]
    return x.new_empty(x.shape), weight.new_empty(width), weight.new_empty(width if center else 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _ = inputs
    ctx.has_residual, ctx.center = residual is not None, bias is not None
    ctx.save_for_backward(output[1] if ctx.has_residual else x, weight, output[2], output[3])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_sum: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, mean, rstd = ctx.saved_tensors
    if not ctx.has_residual:
        grad_sum = None
    if grad is None:
        return grad_sum, grad_sum, None, None, None
    grad_x, grad_weight, grad_bias = torch.ops.megalm.norm_backward(grad, grad_sum, x, weight, mean, rstd, ctx.center)
    return grad_x, grad_x if ctx.has_residual else None, grad_weight, grad_bias if ctx.center else None, None


def check_norm(numbers: Numbers, cols: int) -> tuple[Tensor, Tensor]:
    """LayerNorm with its gradient."""
    x, weight = numbers(5, cols), numbers(cols).float()
    return (
        with_gradient(lambda x: fused_layer_norm(x, weight, weight, 1e-5), x),
        with_gradient(lambda x: layer_norm(x, weight, weight, 1e-5), x),
    )


CHECKS: tuple[Check, ...] = (check_norm,)
