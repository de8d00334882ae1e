"""Parts of named global tensors: how a rank says what it holds of the model and of the optimizer's state.

A rank's parameter is a `ShardSpec`, a box of the global tensor; what ZeRO leaves it of the parameter's state is a
`StateSlice`, a range of that box laid flat. Boxes may cut any dim (compare Megatron-core's ShardedTensor).
"""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Box:
    """A part of a tensor: in every dim, the `sizes` elements from `offsets` on. A scalar's box has no dims."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Box":
        """All of a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    def narrow(self, dim: int, start: int, stop: int) -> "Box":
        """Of this box, the elements start..stop of one dim."""
        offsets, sizes = list(self.offsets), list(self.sizes)
        offsets[dim] += start
        sizes[dim] = stop - start
        return Box(tuple(offsets), tuple(sizes))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    @property
    def strides(self) -> tuple[int, ...]:
        """Elements from one index of each dim to the next, where the box is laid flat (row-major)."""
        return tuple(math.prod(self.sizes[dim + 1 :]) for dim in range(len(self.sizes)))

    def intersection(self, other: "Box") -> "Box":
        """What both cover; its numel is 0 where they do not meet."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        stops = map(min, self._stops(), other._stops())
        return Box(offsets, tuple(max(0, stop - offset) for stop, offset in zip(stops, offsets, strict=True)))

    def index(self, outer: "Box | None" = None) -> tuple[slice, ...]:
        """What indexes this box in a tensor that holds the elements of `outer` (default: the whole tensor)."""
        origin = outer.offsets if outer else (0,) * len(self.offsets)
        starts = [offset - first for offset, first in zip(self.offsets, origin, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.sizes, strict=True))

    def span(self, inner: "Box") -> tuple[int, int]:
        """The shortest range of this box laid flat that holds all elements of `inner`, a part of it."""
        first = sum(map(operator.mul, map(operator.sub, inner.offsets, self.offsets), self.strides))
        return first, first + 1 + sum(
            (size - 1) * stride for size, stride in zip(inner.sizes, self.strides, strict=True)
        )

    def of_range(self, start: int, stop: int) -> Iterator[tuple[int, "Box"]]:
        """The elements start..stop of this box laid flat, as boxes in order, at most 2 x dims - 1 of them.

        Each comes with the number of its first element in the range. In two dims: rest of a row, whole rows, begin of
        a row.
        """
        position = start
        while position < stop:
            box = self._largest_at(position, stop)
            yield position - start, box
            position += box.numel

    def _largest_at(self, position: int, stop: int) -> "Box":
        """The largest box that laid flat begins at `position` and ends before `stop`, both in this box laid flat."""
        box, rest = self, position
        for dim, (size, stride) in enumerate(zip(self.sizes, self.strides, strict=True)):
            index, rest = divmod(rest, stride)
            if rest == 0 and stop - position >= stride:
                return box.narrow(dim, index, index + min(size - index, (stop - position) // stride))
            box = box.narrow(dim, index, index + 1)
        return box

    def _stops(self) -> Iterator[int]:
        return map(operator.add, self.offsets, self.sizes)


@dataclass(frozen=True)
class ShardSpec:
    """Which part of a global tensor a rank's parameter is.

    The parameter may go on after the box with rows that the global tensor does not have (vocabulary padding).
    """

    shape: tuple[int, ...]
    """Shape of the global tensor, without vocabulary padding."""
    box: Box
    is_owner: bool = True
    """Whether this rank speaks for the box: of several ranks of one model copy that hold it, one does. It counts the
    box in norms and writes it to checkpoints."""

    @classmethod
    def of_whole(cls, shape: tuple[int, ...], *, is_owner: bool = True) -> "ShardSpec":
        """The parameter is the whole tensor."""
        return cls(shape, Box.whole(shape), is_owner)

    @classmethod
    def of_dim(cls, shape: tuple[int, ...], dim: int, start: int, stop: int, *, is_owner: bool = True) -> "ShardSpec":
        """The parameter is start..stop of one dim of the tensor."""
        return cls(shape, Box.whole(shape).narrow(dim, start, stop), is_owner)

    @classmethod
    def elsewhere(cls, shape: tuple[int, ...]) -> "ShardSpec":
        """This rank has no part of the tensor."""
        return cls(shape, Box((0,) * len(shape), (0,) * len(shape)), is_owner=False)

    def cut(self, whole: torch.Tensor, local_shape: tuple[int, ...]) -> torch.Tensor:
        """The parameter's value, of `local_shape`, from the global tensor; padding is zero."""
        return self.padded(whole[self.box.index()], local_shape)

    def padded(self, part: torch.Tensor, local_shape: tuple[int, ...]) -> torch.Tensor:
        """The parameter's value, of `local_shape`, from the elements of its box."""
        if part.numel() == math.prod(local_shape):
            return part.reshape(local_shape)
        result = part.new_zeros(math.prod(local_shape))
        result[: part.numel()] = part.reshape(-1)
        return result.view(local_shape)


@dataclass(frozen=True)
class StateSlice:
    """Elements start..stop (row-major) of a rank's box of the global tensor `name`, as fp32 views into the live state.

    Writing into the views changes the state. `moments` maps what the optimizer keeps of this tensor ("exp_avg", ...:
    every tensor has its own kinds) to views like `weight`.
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
