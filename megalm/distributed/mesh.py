"""The mesh of ranks: which rank stands where on the axes pp, dp, cp, tp. Pure arithmetic.

The last axis varies fastest: ranks of one tensor-parallel group are neighbours, pipeline stages are far apart.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from megalm.config.parallel import ParallelConfig
from megalm.errors import LayoutError


class Axis(StrEnum):
    """An axis of the mesh, outermost first."""

    PP = "pp"
    DP = "dp"
    CP = "cp"
    TP = "tp"


@dataclass(frozen=True)
class Mesh:
    """Sizes of the axes; ranks and coordinates follow from them."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1

    @classmethod
    def of(cls, world_size: int, *, pp: int = 1, cp: int = 1, tp: int = 1) -> "Mesh":
        """The mesh of `world_size` ranks; the data-parallel size is what the other axes leave.

        Raises:
            LayoutError: world_size is not a multiple of pp x cp x tp.
        """
        model_size = pp * cp * tp
        if world_size % model_size:
            below = world_size // model_size * model_size
            nearest = " or ".join(str(n) for n in (below, below + model_size) if n)
            raise LayoutError(
                f"world {world_size} = pp {pp} x cp {cp} x tp {tp} x dp ? has no whole dp; start {nearest} ranks, "
                "or change the sizes"
            )
        return cls(pp=pp, dp=world_size // model_size, cp=cp, tp=tp)

    @classmethod
    def of_config(cls, parallel: ParallelConfig, world_size: int) -> "Mesh":
        """The mesh of a run's ranks; `check_layout` has found it possible."""
        return cls.of(
            world_size,
            pp=parallel.pipeline_model_parallel_size,
            cp=parallel.context_parallel_size,
            tp=parallel.tensor_model_parallel_size,
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes in the order of `Axis`."""
        return (self.pp, self.dp, self.cp, self.tp)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return math.prod(self.sizes)

    def size(self, axis: Axis) -> int:
        """Number of ranks along one axis."""
        return self.sizes[list(Axis).index(axis)]

    def coordinate(self, rank: int) -> dict[Axis, int]:
        """Where `rank` stands on every axis."""
        coordinate = {}
        for axis in reversed(Axis):
            rank, coordinate[axis] = divmod(rank, self.size(axis))
        return coordinate

    def rank(self, coordinate: Mapping[Axis, int]) -> int:
        """The rank at `coordinate`; inverse of `coordinate`."""
        rank = 0
        for axis in Axis:
            rank = rank * self.size(axis) + coordinate[axis]
        return rank

    def groups(self, *axes: Axis) -> list[list[int]]:
        """The groups of ranks that differ only along `axes`; every rank is in one of them, and they are ascending."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            coordinate = self.coordinate(rank)
            groups.setdefault(tuple(coordinate[axis] for axis in Axis if axis not in axes), []).append(rank)
        return list(groups.values())

    def __str__(self) -> str:
        return f"world {self.world_size} = " + " x ".join(f"{axis} {self.size(axis)}" for axis in Axis)
