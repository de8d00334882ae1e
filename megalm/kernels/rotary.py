"""Rotary position embedding: pairs of channels of each head turn by an angle proportional to the position.

Shapes: B batch, T sequence, H heads, C head width, R rotary width (R <= C, even).
"""

from typing import Any

import torch
from torch import Tensor

from megalm.kernels.self_test import Check, Numbers, with_gradient
from megalm.kernels.support import fused_takes


def rotary_tables(
    position_ids_BT: Tensor, rotary_dim: int, base: float, interpolation_factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, float32, each (B, T, R/2).

    The angle of pair i at position p is p / interpolation_factor * base^(-2i/R).
    `position_ids_BT` may have B = 1 and is then shared by the batch.
    Source: Su et al. 2021, "RoFormer", section 3.2.2; linear interpolation: Chen et al. 2023, arXiv:2306.15595.
    """
    frequencies = rotary_frequencies(rotary_dim, base, position_ids_BT.device)
    angles = position_ids_BT[..., None].float() / interpolation_factor * frequencies
    return angles.cos(), angles.sin()


def rotary_frequencies(rotary_dim: int, base: float, device: torch.device | None = None) -> Tensor:
    """What pair i turns from one position to the next, in radians: base^(-2i/R), float32 (R/2,)."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
    return 1.0 / (base**exponents)


def apply_rotary(x_BTHC: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """Turn channel i against channel i + R/2 of every head, for i < R/2; channels from R on pass unchanged.

    This is the half-split ("rotate_half") pairing of Hugging Face Llama and GPT-NeoX, not the interleaved pairing of
    the paper. `cos_BTR` and `sin_BTR` come from `rotary_tables` (B, T, R/2). The products are float32 and rounded once;
    the result has the dtype of `x_BTHC`.
    """
    half = cos_BTR.shape[-1]
    cos, sin = cos_BTR[..., None, :], sin_BTR[..., None, :]
    first, second = x_BTHC[..., :half].to(cos.dtype), x_BTHC[..., half : 2 * half].to(cos.dtype)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTHC.dtype)
    if 2 * half == x_BTHC.shape[-1]:
        return turned
    return torch.cat((turned, x_BTHC[..., 2 * half :]), dim=-1)


def fused_rotary(x_BTHC: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """`apply_rotary`, one pass over memory; the gradient turns back by the same tables."""
    if not fused_takes(x_BTHC) or cos_BTR.dtype != torch.float32:
        return apply_rotary(x_BTHC, cos_BTR, sin_BTR)
    y: Tensor = torch.ops.megalm.rotary(x_BTHC, cos_BTR, sin_BTR, False)
    return y


def register() -> None:
    """Fake implementations and gradient."""
    torch.library.register_fake("megalm::rotary", lambda x, cos, sin, inverse: x.new_empty(x.shape))
    torch.library.register_autograd("megalm::rotary", _backward, setup_context=_setup)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return torch.ops.megalm.rotary(grad, cos, sin, not ctx.inverse), None, None, None


def check_rotary(numbers: Numbers, cols: int) -> tuple[Tensor, Tensor]:
    """Of whole heads, and of a part of them where they are odd; with its gradient."""
    x = numbers(2, 3, 2, cols + cols % 2)
    tables = rotary_tables(torch.arange(3)[None], x.shape[-1] - 4 * (cols % 2), 100.0)
    return (
        with_gradient(lambda x: fused_rotary(x, *tables), x),
        with_gradient(lambda x: apply_rotary(x, *tables), x),
    )


CHECKS: tuple[Check, ...] = (check_rotary,)
