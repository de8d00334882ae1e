"""Relative positions inside the tensor-parallel region. Shapes: N buckets, H heads of all ranks or of one."""

from torch import Tensor, nn

from megalm.parallel.region import TensorParallel


class OwnHeadsBias(nn.Module):
    """The bias of the heads that this rank has; the table is whole on every rank."""

    def __init__(self, whole: nn.Module, tp: TensorParallel) -> None:
        super().__init__()
        self.whole, self.tp = whole, tp

    def forward(self, table_NH: Tensor, length: int, before: int = 0) -> Tensor:
        """The bias (1, H, T, S) of this rank's heads."""
        own_NH: Tensor = table_NH.chunk(self.tp.size, dim=1)[self.tp.rank]
        bias: Tensor = self.whole(own_NH, length, before)
        return bias
