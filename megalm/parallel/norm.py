"""Normalization inside the tensor-parallel region over channels that are spread over the ranks.

Shapes: B batch, T sequence, D a rank's channels.
"""

import torch
from torch import Tensor

from megalm.distributed.functional import all_reduce_from_region, copy_to_region
from megalm.models.blocks.norm import FullWidthRMSNorm
from megalm.parallel.region import TensorParallel


class FullWidthParallelRMSNorm(FullWidthRMSNorm):
    """The norm of all heads of which each rank has some: the ranks share their sums of squares.

    `parts` ranks hold different heads; where the group has more, each of them is held by several ranks.
    """

    def __init__(self, norm: FullWidthRMSNorm, tp: TensorParallel, parts: int) -> None:
        super().__init__(norm.weight.numel() // parts, norm.epsilon, norm.offset)
        self.width = norm.weight.numel()
        self.copies = tp.size // parts
        self.tp = tp

    def forward(self, x_BTD: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalized x, same shape and dtype."""
        assert residual is None, "queries and keys have no residual"
        x = x_BTD.float()
        total = all_reduce_from_region(x.square().sum(-1, keepdim=True), self.tp.group) / self.copies
        # every rank's use of the sum counts in the gradient of every rank's channels
        scale = torch.rsqrt(copy_to_region(total, self.tp.group) / self.width + self.epsilon)
        return (x * scale * self._scale().float()).to(x_BTD.dtype)
