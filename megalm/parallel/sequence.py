"""What sequence parallelism changes outside the tensor-parallel region, where a rank has its part of the sequence.

Norms and residual additions work on any part as they are. Shapes: B batch, T sequence, D model width.
Source: Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from megalm.distributed.functional import all_gather_from_region, own_shard
from megalm.models.blocks.dropout import Dropout
from megalm.models.blocks.embedding import EmbeddingTable
from megalm.parallel.region import SEQUENCE, TensorParallel


class SequenceParallelPositions(nn.Module):
    """Position embeddings of this rank's part of the sequence; the table is whole on every rank."""

    def __init__(self, tp: TensorParallel, positions: int, width: int) -> None:
        super().__init__()
        self.weight = EmbeddingTable(positions, width).weight
        self.tp = tp

    def forward(self, position_ids_BT: Tensor) -> Tensor:
        """Rows (B, T / ranks, D) for this rank's part of `position_ids_BT`, which are those of the whole sequence."""
        return F.embedding(own_shard(position_ids_BT, self.tp.group, SEQUENCE), self.weight)


class SequenceParallelDropout(Dropout):
    """Dropout of this rank's part of the sequence, with the mask that one device would draw for the whole.

    So dropout, and whatever is drawn after it, does not depend on the number of ranks. Nothing is drawn where p is 0.
    """

    def __init__(self, tp: TensorParallel, p: float) -> None:
        super().__init__(p)
        self.part = (tp.rank, tp.size)


class WholeSequenceHook:
    """A forward pre-hook: the first argument becomes the whole sequence, for work that all ranks do alike."""

    def __init__(self, tp: TensorParallel) -> None:
        self.tp = tp

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The arguments with which the module runs."""
        return (all_gather_from_region(arguments[0], self.tp.group, SEQUENCE), *arguments[1:])
