"""A micro-batch: tensors by name, the numbers of its samples, and the seed of what a model draws for it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ON_HOST = frozenset({"cu_seqlens", "prefix_lengths", "hidden_places"})
"""Fields that models read on the host, where a copy on the device would make it wait."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The samples `numbers` of one data-parallel rank, stacked: each tensor is [micro-batch size, ...]."""

    tensors: Mapping[str, Tensor]
    numbers: tuple[int, ...] = ()
    """Sample numbers, one a row; they do not depend on the layout."""
    seed: int | None = None
    """Seed of what the model draws (dropout); it follows from the first sample. None: nothing is drawn."""

    def __getitem__(self, name: str) -> Tensor:
        """The field `name`."""
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        """The field `name`, or None if the objective has none."""
        return self.tensors.get(name)

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`, but for what stays on the host."""
        moved = {name: x if name in ON_HOST else x.to(device, non_blocking=True) for name, x in self.tensors.items()}
        return replace(self, tensors=moved)
