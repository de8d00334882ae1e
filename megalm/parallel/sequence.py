"""What sequence parallelism changes outside the tensor-parallel region, where a rank has its part of the sequence.

Norms and residual additions work on any part as they are. Shapes: B batch, T sequence, D model width.
Source: Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from megalm.dist.functional import own_part
from megalm.parallel.region import SEQUENCE, TensorParallel


class SequenceParallelPositions(nn.Module):
    """Position embeddings of this rank's part of the sequence; the table is whole on every rank."""

    def __init__(self, place: TensorParallel, positions: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Embedding(positions, width).weight
        self.place = place

    def forward(self, position_ids_BT: Tensor) -> Tensor:
        """Rows (B, T / ranks, D) for this rank's part of `position_ids_BT`, which are those of the whole sequence."""
        return F.embedding(own_part(position_ids_BT, self.place.group, SEQUENCE), self.weight)


class SequenceParallelDropout(nn.Dropout):
    """Dropout of this rank's part of the sequence, with the mask that one device would draw for the whole.

    Each rank draws the whole mask and uses its part: dropout, and whatever is drawn after it, does not depend on the
    number of ranks. Nothing is drawn where p is 0.
    """

    def __init__(self, place: TensorParallel, p: float) -> None:
        super().__init__(p)
        self.place = place

    def forward(self, x_BTD: Tensor) -> Tensor:
        """`x_BTD` with elements zeroed at random and the others scaled by 1 / (1 - p), when training."""
        if not self.training or self.p == 0.0:
            return x_BTD
        B, T, D = x_BTD.shape
        scales_BTD = F.dropout(x_BTD.new_ones(B, T * self.place.size, D), self.p)
        # a copy: a view would keep the whole mask until the backward pass
        return x_BTD * own_part(scales_BTD, self.place.group, SEQUENCE).clone()
