"""The memory of the rows of the global batch, which segment recurrence hands on from step to step.

Shapes: B samples of the global batch, M positions of the memory, D model width.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megalm.config.sections import RunConfig
from megalm.distributed.groups import MeshGroups
from megalm.distributed.shards import Box, ShardSpec, StateSlice
from megalm.models.blocks.segments import SegmentMemory

Memories = dict[int, SegmentMemory]
"""By the place of the micro-batch in its step."""
KIND = "memory"
"""What a checkpoint calls it, among weights and moments."""


@dataclass(frozen=True)
class MemorySlice(StateSlice):
    """Rows of the memory of one layer, a tensor (B, M, D) of its own; fp32, which holds every type that it may have."""

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
        return [
            MemorySlice(_name(layer), spec, 0, spec.box.numel, kept.detach().float().view(-1), {})
            for number, memory in sorted(self._trained.items() if self.is_owner else ())
            for layer, kept in memory.layers.items()
            for spec in [ShardSpec((self._all_rows, *kept.shape[1:]), self._box(number, tuple(kept.shape[1:])))]
        ]

    def load(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str, str, Box], Tensor]) -> None:
        """Go on from what a checkpoint holds of it: `shapes` by name, and `read` gives a box, flat, by (name, kind).

        Raises:
            ValueError: it holds the memory of another batch or model.
        """
        for name, shape in shapes.items():
            if (shape[0], *shape[2:]) != (self._all_rows, self.width) or not 0 < shape[1] <= self.size:
                raise ValueError(f"{name} is {shape}, not ({self._all_rows}, up to {self.size}, {self.width})")
        if shapes.keys() != {_name(layer) for layer in range(self.num_layers if shapes else 0)}:
            raise ValueError(f"its memory is of {len(shapes)} layers, not of {self.num_layers}")
        for number in range(self.micro_batches if shapes else 0):
            layers = {}
            for layer in range(self.num_layers):
                box = self._box(number, shapes[_name(layer)][1:])
                part = read(_name(layer), KIND, box).view(box.sizes)
                layers[layer] = part.to(self.device, self.dtype)
            self._trained[number] = SegmentMemory(self.size, layers)

    @property
    def _all_rows(self) -> int:
        return self.micro_batches * self.ranks * self.rows

    def _box(self, number: int, shape: tuple[int, ...]) -> Box:
        """The rows of a micro-batch: as the loader deals samples out."""
        first = (number * self.ranks + self.rank) * self.rows
        return Box.whole((self._all_rows, *shape)).narrow(0, first, first + self.rows)


def _name(layer: int) -> str:
    return f"segment_memory.{layer}"
