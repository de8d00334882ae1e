"""Linear layers of which each rank holds a part of the weight.

Shapes: B batch, T sequence, D input width, F output width, all of them a rank's own.
Source: Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053, section 3.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from megalm.parallel.region import TensorParallel


class ColumnParallelLinear(nn.Linear):
    """A linear layer inside the region whose output channels are spread: y_rank = x W_rank^T + b_rank.

    Several of them share one input, which enters the region once, for all (`region.Entrance`).
    """


class RowParallelLinear(nn.Module):
    """A linear layer whose input channels are spread: y = sum over ranks of x_rank W_rank^T, + b; leaves the region.

    The bias is whole on every rank and is added once, to the sum.
    """

    def __init__(self, place: TensorParallel, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias)
        self.weight, self.bias = linear.weight, linear.bias
        self.place = place

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The layer's output (B, T, F) as it stands outside the region."""
        y_BTF = self.place.leave(F.linear(x_BTD, self.weight))
        return y_BTF if self.bias is None else y_BTF + self.bias
