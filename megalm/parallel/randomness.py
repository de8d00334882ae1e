"""Dropout inside the tensor-parallel region. Shapes: B batch, T sequence, F channels of this rank.

What depends on the layout and what does not: every micro-batch has a seed of its own, by its first sample, and torch's
generators start from it on every rank of a model copy. Outside the region all ranks draw the same numbers, as one
device does (`SequenceParallelDropout` too); attention's dropout draws from a generator state of its own, different on
every tensor-parallel rank, that leaves no trace in the numbers drawn after it. So hidden dropout is the same for every
tensor-parallel size, with and without sequence parallelism, and for every data-parallel size at one micro-batch size;
that of an MLP's channels draws the mask of all of them and takes this rank's part of it, so it is too; attention
dropout depends on the tensor-parallel size, and on nothing else of the layout.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megalm.models.blocks.dropout import Dropout
from megalm.models.blocks.randomness import seed_generators
from megalm.parallel.region import TensorParallel
from megalm.randomness import stable_seed


class ChannelParallelDropout(Dropout):
    """Dropout of this rank's channels, with the mask that one device would draw for all of them."""

    def __init__(self, tp: TensorParallel, p: float) -> None:
        super().__init__(p)
        self.part = (tp.rank, tp.size)

    def forward(self, x_BTF: Tensor, residual_BTF: Tensor | None = None) -> Tensor:
        """As `Dropout`, for a part of the last dim."""
        assert residual_BTF is None, "channels inside the region are no residual stream"
        # rank by rank the channels of a position are parts of a dim 1 of their own
        y_N1F = super().forward(x_BTF.flatten(0, 1)[:, None])
        return y_N1F.view_as(x_BTF)


class OwnDropout(nn.Module):
    """Runs `core` on random numbers of rank `rank`; its callers' numbers go on as if it had drawn one."""

    def __init__(self, core: nn.Module, rank: int) -> None:
        super().__init__()
        self.core = core
        self.rank = rank

    def forward(self, q: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """What `core` gives."""
        if not self.training:
            result: Tensor = self.core(q, *arguments, **options)
            return result
        drawn = int(torch.randint(2**62, ()))  # on the CPU: no wait for the device
        devices = [q.device] if q.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            seed_generators(stable_seed(drawn, "tensor-parallel rank", self.rank))
            result = self.core(q, *arguments, **options)
        return result
