"""Sums of per-token losses. The loss of a global batch is sum / count over the unmasked tokens of all its parts.

A mean of means would weigh tokens of sparsely masked micro-batches more: ranks and micro-batches hold different token
counts. So models return sums and counts, and the engine divides once.
"""

import torch
from torch import Tensor


def summed_loss(losses_BT: Tensor, loss_mask_BT: Tensor) -> Tensor:
    """Sum of the losses where the mask is one (or weighted by it): a float32 scalar, differentiable.

    `loss_mask_BT` is bool, integer or float. A masked position adds nothing even where its loss is not finite.
    """
    weights = loss_mask_BT.to(torch.float32)
    return torch.where(weights != 0, losses_BT.float() * weights, 0.0).sum()


def token_count(loss_mask_BT: Tensor) -> Tensor:
    """Number of unmasked tokens (sum of the mask's weights): a float64 scalar, exact beyond 2^24 tokens."""
    return loss_mask_BT.sum(dtype=torch.float64)
