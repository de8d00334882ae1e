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


class DatasetSums:
    """Sums of losses and tokens for each dataset of a blend, over the micro-batches of a step."""

    def __init__(self, num_datasets: int, device: torch.device) -> None:
        self._sums = torch.zeros(2, num_datasets, dtype=torch.float64, device=device)

    def add(self, losses_BT: Tensor, loss_mask_BT: Tensor, dataset_B: Tensor) -> None:
        """Adds one micro-batch, whose rows come from the datasets `dataset_B` (int64)."""
        weights = loss_mask_BT.to(torch.float32)
        losses = torch.where(weights != 0, losses_BT.float() * weights, 0.0)
        rows = torch.stack([losses.sum(dim=1, dtype=torch.float64), weights.sum(dim=1, dtype=torch.float64)])
        self._sums.index_add_(1, dataset_B, rows)

    def take(self) -> Tensor:
        """(sums of losses, numbers of tokens), float64 [2, num_datasets]; the next step begins at zero."""
        sums = self._sums.clone()
        self._sums.zero_()
        return sums
