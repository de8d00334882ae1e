"""The memory of the rows of the global batch, which segment recurrence hands on from step to step.

Shapes: M positions of the memory, D model width.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megalm.config.sections import RunConfig
from megalm.distributed.groups import MeshGroups
from megalm.distributed.shards import Box, ShardSpec, StateSlice
from megalm.models.blocks.segments import SegmentMemory

Shape = tuple[int, ...]
Memories = dict[int, SegmentMemory]
"""By the place of the micro-batch in its step."""
KIND = "memory"
"""What a checkpoint calls it, among weights and moments."""


@dataclass(frozen=True)
class MemorySlice(StateSlice):
    """A rank's rows of the memory of one layer, fp32, which holds every type that it may have.

    The tensor is (data-parallel ranks, micro-batches, rows of one, M, D) of the layout that writes it, so that a rank's
    part is one piece.
    """

    def tensors(self, with_moments: bool = True) -> dict[str, Tensor]:
        """The memory alone."""
        return {KIND: self.weight}


@dataclass(kw_only=True, eq=False)
class BatchMemory:
    """What this rank remembers of the rows that it trains, and of those that it evaluates."""

    size: int
    """Positions."""
    width: int
    num_layers: int
    rows: int
    """Of a micro-batch of training."""
    micro_batches: int
    """Of a step of training on each data-parallel rank."""
    rank: int
    """Among the data-parallel ranks ..."""
    ranks: int
    """... of which there are so many."""
    is_owner: bool
    """Of the ranks of one model copy, which all remember the same, this one writes it."""
    dtype: torch.dtype
    device: torch.device
    _trained: Memories = field(default_factory=dict)
    _evaluated: Memories = field(default_factory=dict)

    @classmethod
    def build(
        cls, config: RunConfig, groups: MeshGroups, dtype: torch.dtype, device: torch.device
    ) -> "BatchMemory | None":
        """The memory of a run; None without --segment-memory."""
        model, size = config.model, config.model.segment_memory
        if size is None:
            return None
        return cls(
            size=size,
            width=model.hidden_size,
            num_layers=model.num_layers,
            rows=config.batch.micro_size,
            micro_batches=config.batch.accumulation(groups.data.size),
            rank=groups.data.rank,
            ranks=groups.data.size,
            is_owner=groups.tensor.rank == 0,
            dtype=dtype,
            device=device,
        )

    def trained(self, number: int) -> SegmentMemory:
        """That of a micro-batch of training, by its place in the step."""
        return self._trained.setdefault(number, SegmentMemory(self.size))

    def evaluated(self, number: int) -> SegmentMemory:
        """That of a micro-batch of an evaluation."""
        return self._evaluated.setdefault(number, SegmentMemory(self.size))

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """What is evaluated inside is text from its beginning on."""
        self._evaluated.clear()
        yield
        self._evaluated.clear()

    @property
    def written_elements(self) -> int:
        """Most elements that this rank writes to a checkpoint."""
        return self.is_owner * self.num_layers * self.micro_batches * self.rows * self.size * self.width

    def slices(self) -> list[MemorySlice]:
        """What this rank is to write of the rows that are trained; nothing before the first step."""
        if not self.is_owner or not self._trained:
            return []
        memories = [self._trained[number].layers for number in range(self.micro_batches)]
        found = []
        for layer in range(self.num_layers):
            own = torch.stack([layers[layer] for layers in memories]).detach().float()
            spec = ShardSpec.of_dim((self.ranks, *own.shape), 0, self.rank, self.rank + 1)
            found.append(MemorySlice(_name(layer), spec, 0, own.numel(), own.view(-1), {}))
        return found

    def load(self, shapes: Mapping[str, Shape], read: Callable[[str, str, Box], Tensor]) -> None:
        """Go on from what a checkpoint holds of it, whatever split of the batch wrote it: `shapes` by name, and `read`
        gives a box, flat, by (name, kind).

        Raises:
            ValueError: it holds the memory of another batch or model.
        """
        for name, shape in shapes.items():
            if len(shape) != 5 or math.prod(shape[:3]) != self._all_rows or shape[4] != self.width:
                raise ValueError(f"{name} is {shape}, not {self._all_rows} rows of positions of width {self.width}")
            if not 0 < shape[3] <= self.size:
                raise ValueError(f"{name} has {shape[3]} positions, not 1 to {self.size}")
        if not shapes:
            return
        if shapes.keys() != {_name(layer) for layer in range(self.num_layers)}:
            raise ValueError(f"its memory is of {len(shapes)} layers, not of {self.num_layers}")
        for number in range(self.micro_batches):
            first = (number * self.ranks + self.rank) * self.rows  # as the loader deals samples out
            layers = {}
            for layer in range(self.num_layers):
                name, shape = _name(layer), shapes[_name(layer)]
                rows = [read(name, KIND, _box_of_row(shape, first + row)) for row in range(self.rows)]
                layers[layer] = torch.stack(rows).view(self.rows, *shape[3:]).to(self.device, self.dtype)
            self._trained[number] = SegmentMemory(self.size, layers)

    @property
    def _all_rows(self) -> int:
        return self.micro_batches * self.ranks * self.rows


def _box_of_row(shape: Shape, number: int) -> Box:
    """Where a row of the global batch lies in a stored tensor."""
    ranks, _, rows, *kept = shape
    micro_batch, inside = divmod(number, ranks * rows)
    rank, row = divmod(inside, rows)
    return Box((rank, micro_batch, row, 0, 0), (1, 1, 1, *kept))


def _name(layer: int) -> str:
    return f"segment_memory.{layer}"
