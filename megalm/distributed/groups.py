"""The process groups of the mesh: one along each axis, and one for the ranks that share one copy of the model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megalm.distributed.mesh import Axis, Mesh


@dataclass(frozen=True)
class MeshGroups:
    """This rank's groups on the mesh. Values, not globals: whoever communicates is given the group."""

    mesh: Mesh
    rank: int
    by_axis: dict[Axis, ProcessGroup]
    model_parallel_group: ProcessGroup
    """The ranks that together hold one copy of the model: all that share this rank's place on the dp axis."""

    @classmethod
    def build(cls, mesh: Mesh) -> "MeshGroups":
        """The groups of this rank; every rank of the job calls it, inside the process group."""
        assert mesh.world_size == dist.get_world_size(), f"{mesh} does not describe {dist.get_world_size()} ranks"
        rank = dist.get_rank()
        by_axis = {axis: _own_group(mesh.groups(axis), rank) for axis in Axis}
        return cls(mesh, rank, by_axis, _own_group(mesh.model_copies(), rank))

    def group(self, axis: Axis) -> ProcessGroup:
        """The ranks that differ from this one only along `axis`."""
        return self.by_axis[axis]

    def size(self, axis: Axis) -> int:
        """Number of ranks along `axis`."""
        return self.mesh.size(axis)

    def axis_rank(self, axis: Axis) -> int:
        """Where this rank stands along `axis`."""
        return self.mesh.coordinate(self.rank)[axis]

    def neighbours(self, axis: Axis, count: int) -> ProcessGroup:
        """The run of `count` ranks along `axis` in which this rank stands; every rank of the job calls it."""
        runs = [ranks[i : i + count] for ranks in self.mesh.groups(axis) for i in range(0, len(ranks), count)]
        return _own_group(runs, self.rank)

    def subgroup(self, axis: Axis, positions: Sequence[int]) -> ProcessGroup | None:
        """The ranks at `positions` of this rank's group along `axis`; None where this rank is not among them.

        Every rank of the job calls it.
        """
        chosen = [[ranks[position] for position in positions] for ranks in self.mesh.groups(axis)]
        return _find_group(chosen, self.rank)


def _find_group(groups: list[list[int]], rank: int) -> ProcessGroup | None:
    """The group that holds `rank`, if any; all ranks create all groups, in the same order."""
    own = None
    for ranks in groups:
        whole = len(ranks) == dist.get_world_size()
        group = dist.group.WORLD if whole else dist.new_group(ranks)
        if rank in ranks:
            own = group
    return own


def _own_group(groups: list[list[int]], rank: int) -> ProcessGroup:
    own = _find_group(groups, rank)
    assert own is not None, f"rank {rank} stands in one of {groups}"
    return own
