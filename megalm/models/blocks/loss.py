"""Weighing the losses of tokens, and adding up named losses."""

from collections.abc import Mapping

import torch
from torch import Tensor


def weighted_losses(losses_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """Losses x weights, float32 (B, T), differentiable; where the weight is zero the loss need not be finite.

    The weights are bool, integer or float.
    """
    weights_BT = weights_BT.to(torch.float32)
    return torch.where(weights_BT != 0, losses_BT.float() * weights_BT, 0.0)


def scaled_total(losses: Mapping[str, Tensor], scales: Mapping[str, float]) -> Tensor:
    """Sum over names of scale x sum of the losses: a float32 scalar, differentiable."""
    terms = [losses[name].sum() * scale for name, scale in scales.items()]
    return sum(terms[1:], start=terms[0])
