"""How tensors of another library's model make up ours, both ways: what a family's table of names consists of.

A foreign tensor is one of ours, or several of ours side by side. `Layout` says how: it joins ours to the foreign one,
and reads any part of one of ours out of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megalm.config.model import ModelConfig

Shape = tuple[int, ...]
Index = tuple[slice, ...]
"""A part of a tensor: a slice with start and stop for each dim."""
Source = Callable[[Index], Tensor]
"""A foreign tensor, of which any part can be read."""


class Layout(Protocol):
    """How tensors of ours lie in a foreign one. `shapes` are those of ours, in order."""

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Shape of the foreign tensor."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The foreign tensor."""

    def read(self, source: Source, number: int, shapes: Sequence[Shape], index: Index) -> Tensor:
        """The part `index` of our tensor `number`."""


class Stacked:
    """Ours, one after the other along the first dim; one alone is the same tensor."""

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """All rows."""
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """All rows."""
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))

    def read(self, source: Source, number: int, shapes: Sequence[Shape], index: Index) -> Tensor:
        """Rows further down."""
        before = sum(shape[0] for shape in shapes[:number])
        return source((_moved(index[0], before), *index[1:]))


class Transposed(Stacked):
    """The transpose of what `Stacked` has: weights of transformers' Conv1D."""

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Columns first."""
        return super().shape(shapes)[::-1]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Columns first."""
        return _transposed(super().join(parts))

    def read(self, source: Source, number: int, shapes: Sequence[Shape], index: Index) -> Tensor:
        """From columns further right."""
        return super().read(lambda rows: _transposed(source(rows[::-1])), number, shapes, index)


@dataclass(frozen=True)
class ByHead:
    """Queries, keys and values of one head, then of the next (GPT-NeoX): rows (head, which of ours, channel)."""

    head_dim: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """All rows."""
        return Stacked().shape(shapes)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Heads taken in turns."""
        heads = [part.reshape(-1, self.head_dim, *part.shape[1:]) for part in parts]
        return torch.stack(heads, dim=1).flatten(0, 2)

    def read(self, source: Source, number: int, shapes: Sequence[Shape], index: Index) -> Tensor:
        """The rows of the heads that `index` touches, then those of them that it wants."""
        rows, width, parts = index[0], self.head_dim, len(shapes)
        first, last = rows.start // width, -(-rows.stop // width)
        stored = source((slice(first * parts * width, last * parts * width), *index[1:]))
        own = stored.reshape(last - first, parts, width, *stored.shape[1:])[:, number].flatten(0, 1)
        return own[_moved(rows, -first * width)]


STACKED = Stacked()
TRANSPOSED = Transposed()


@dataclass(frozen=True)
class ForeignTensor:
    """One tensor of the other library; {n} in names is the number of a layer."""

    name: str
    ours: tuple[str, ...]
    layout: Layout = STACKED

    def of_layer(self, number: int) -> "ForeignTensor":
        """The same with the number of a layer in its names."""
        names = tuple(name.replace("{n}", str(number)) for name in self.ours)
        return ForeignTensor(self.name.replace("{n}", str(number)), names, self.layout)


class ForeignNames(Protocol):
    """How a class of another library calls the tensors of its models."""

    @property
    def prefix(self) -> str:
        """What all names but the head's begin with; files of the model without its head lack it."""

    @property
    def head(self) -> str:
        """The module of the output head."""

    @property
    def ignored(self) -> tuple[str, ...]:
        """Patterns of tensors in its files that are no parameters."""

    def tensors(self, config: ModelConfig) -> list[ForeignTensor]:
        """Every tensor that such a model may have; of those whose parts the model lacks there is none."""


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.T if tensor.dim() == 2 else tensor  # biases have one dim


def _moved(rows: slice, by: int) -> slice:
    return slice(rows.start + by, rows.stop + by)
