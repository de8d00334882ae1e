"""Dropout inside the tensor-parallel region.

What depends on the layout and what does not: every micro-batch has a seed of its own, by its first sample, and torch's
generators start from it on every rank of a model copy. Outside the region all ranks draw the same numbers, as one
device does (`SequenceParallelDropout` too); attention's dropout draws from a generator state of its own, different on
every tensor-parallel rank, that leaves no trace in the numbers drawn after it. So hidden dropout is the same for every
tensor-parallel size, with and without sequence parallelism, and for every data-parallel size at one micro-batch size;
attention dropout depends on the tensor-parallel size, and on nothing else of the layout.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megalm.models.blocks.randomness import seed_generators
from megalm.randomness import stable_seed


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
