"""The process groups of a rank, by what they are for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megalm.distributed.mesh import Axis, Mesh

DATA = (Axis.DP,)
"""Axes along which ranks have other samples."""
WEIGHTS = (Axis.DP, Axis.CP)
"""Axes along which ranks hold the same weights, and each has gradients from other tokens."""
MODEL_COPY = (Axis.PP, Axis.TP)
"""Axes along which ranks hold the parts of one copy of the model."""


@dataclass(frozen=True)
class RankGroup:
    """A process group and this rank's number in it."""

    group: ProcessGroup
    rank: int
    size: int


@dataclass(frozen=True, kw_only=True)
class MeshGroups:
    """This rank's groups on the mesh. Values, not globals: whoever communicates is given the group."""

    mesh: Mesh
    global_rank: int
    by_axis: dict[Axis, RankGroup]
    """Ranks that differ from this one only along an axis."""
    data: RankGroup
    """Ranks that have other samples than this one, and stand where it stands in their copy of the model."""
    weights: RankGroup
    """Ranks with the same weights as this one: gradients are summed and ZeRO's parts are spread there."""
    model_copy: RankGroup
    """Ranks that with this one hold a copy of the model: its norms are summed there."""

    @classmethod
    def build(cls, mesh: Mesh) -> "MeshGroups":
        """The groups of this rank; every rank of the job calls it, inside the process group."""
        assert mesh.world_size == dist.get_world_size(), f"{mesh} does not describe {dist.get_world_size()} ranks"
        rank = dist.get_rank()
        built: dict[tuple[Axis, ...], RankGroup] = {}

        def along(*axes: Axis) -> RankGroup:
            longer = tuple(axis for axis in axes if mesh.size(axis) > 1)  # the others do not change who is in it
            if longer not in built:
                built[longer] = _own_group(mesh.groups(*longer), rank)
            return built[longer]

        return cls(
            mesh=mesh,
            global_rank=rank,
            by_axis={axis: along(axis) for axis in Axis},
            data=along(*DATA),
            weights=along(*WEIGHTS),
            model_copy=along(*MODEL_COPY),
        )

    @property
    def tensor(self) -> RankGroup:
        """Ranks that share each layer with this one."""
        return self.by_axis[Axis.TP]

    @property
    def is_first_with_samples(self) -> bool:
        """Whether this rank is the first of those that read the same samples."""
        return self.model_copy.rank == 0 and self.by_axis[Axis.CP].rank == 0

    @property
    def pipeline(self) -> RankGroup:
        """Ranks that hold the stages of a pipeline with this one."""
        return self.by_axis[Axis.PP]

    def neighbours(self, axis: Axis, count: int) -> ProcessGroup:
        """The run of `count` ranks along `axis` in which this rank stands; every rank of the job calls it."""
        runs = [ranks[i : i + count] for ranks in self.mesh.groups(axis) for i in range(0, len(ranks), count)]
        return _own_group(runs, self.global_rank).group

    def subgroup(self, axis: Axis, positions: Sequence[int]) -> ProcessGroup | None:
        """The ranks at `positions` of this rank's group along `axis`; None where this rank is not among them.

        Every rank of the job calls it.
        """
        chosen = [[ranks[position] for position in positions] for ranks in self.mesh.groups(axis)]
        found = _find_group(chosen, self.global_rank)
        return found.group if found else None


def _find_group(groups: list[list[int]], rank: int) -> RankGroup | None:
    """The group that holds `rank`, if any; all ranks create all groups, in the same order."""
    own = None
    for ranks in groups:
        whole = len(ranks) == dist.get_world_size()
        group = dist.group.WORLD if whole else dist.new_group(ranks)
        if rank in ranks:
            assert group is not None, "inside the process group"
            own = RankGroup(group, ranks.index(rank), len(ranks))
    return own


def _own_group(groups: list[list[int]], rank: int) -> RankGroup:
    own = _find_group(groups, rank)
    assert own is not None, f"rank {rank} stands in one of {groups}"
    return own
