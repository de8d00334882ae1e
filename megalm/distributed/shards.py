"""Parts of named global tensors: how a rank says what it holds of the model and of the optimizer's state.

A tensor is seen as a matrix: its first dim by all the others laid flat (a vector has one column). A rank's parameter is
a `ShardSpec`, a rectangle of that matrix; its optimizer state is a `StateSlice`, a range of that rectangle laid flat.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Box:
    """Rows and columns of a matrix, half-open."""

    rows: tuple[int, int]
    columns: tuple[int, int]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Box":
        """All of a tensor of this shape."""
        return cls((0, shape[0]), (0, math.prod(shape[1:])))

    @property
    def height(self) -> int:
        """Number of rows."""
        return max(0, self.rows[1] - self.rows[0])

    @property
    def width(self) -> int:
        """Number of columns."""
        return max(0, self.columns[1] - self.columns[0])

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.height * self.width

    def intersection(self, other: "Box") -> "Box":
        """What both cover; its size is 0 where they do not meet."""
        return Box(_overlap(self.rows, other.rows), _overlap(self.columns, other.columns))

    def of_range(self, start: int, stop: int) -> Iterator[tuple[int, "Box"]]:
        """The elements start..stop of this rectangle laid flat as at most three rectangles: rest of a row, whole rows,
        begin of a row; each with the number of its first element in the range.
        """
        position = start
        while position < stop:
            row, column = divmod(position, self.width)
            rows = 1 if column or stop - position < self.width else (stop - position) // self.width
            count = min(stop - position, rows * self.width - column)
            top, left = self.rows[0] + row, self.columns[0] + column
            yield position - start, Box((top, top + rows), (left, left + count // rows))
            position += count


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return max(one[0], other[0]), min(one[1], other[1])


@dataclass(frozen=True)
class ShardSpec:
    """Which part of a global tensor a rank's parameter is.

    The parameter may go on after the part with rows that the global tensor does not have (vocabulary padding).
    """

    shape: tuple[int, ...]
    """Shape of the global tensor, without vocabulary padding."""
    part: Box
    is_owner: bool = True
    """Whether this rank speaks for the part: of several ranks of one model copy that hold it, one does. It counts the
    part in norms and writes it to checkpoints."""

    @classmethod
    def of_whole(cls, shape: tuple[int, ...], *, is_owner: bool = True) -> "ShardSpec":
        """The parameter is the whole tensor."""
        return cls(shape, Box.whole(shape), is_owner)

    def cut(self, whole: torch.Tensor, local_shape: tuple[int, ...]) -> torch.Tensor:
        """The parameter's value, of `local_shape`, from the global tensor; padding is zero."""
        part = self.part
        piece = whole.reshape(whole.shape[0], -1)[part.rows[0] : part.rows[1], part.columns[0] : part.columns[1]]
        return self.padded(piece, local_shape)

    def padded(self, part: torch.Tensor, local_shape: tuple[int, ...]) -> torch.Tensor:
        """The parameter's value, of `local_shape`, from the elements of its part."""
        if part.numel() == math.prod(local_shape):
            return part.reshape(local_shape)
        result = part.new_zeros(math.prod(local_shape))
        result[: part.numel()] = part.reshape(-1)
        return result.view(local_shape)


@dataclass(frozen=True)
class StateSlice:
    """Elements start..stop (row-major) of the part of the global tensor `name`, as fp32 views into the live state.

    Writing into the views changes the state. `moments` maps "exp_avg" and "exp_avg_sq" to views like `weight`.
    """

    name: str
    shard_spec: ShardSpec
    start: int
    stop: int
    weight: torch.Tensor
    moments: dict[str, torch.Tensor]

    def tensors(self, with_moments: bool = True) -> dict[str, torch.Tensor]:
        """Views by kind: "weight" first, then the moments."""
        return {"weight": self.weight, **(self.moments if with_moments else {})}
