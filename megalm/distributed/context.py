"""What a process of a job is: its rank on the mesh, its groups and its device."""

from dataclasses import dataclass

import torch

from megalm.distributed.groups import MeshGroups
from megalm.distributed.mesh import Mesh


@dataclass(frozen=True)
class RankContext:
    """This rank's groups on the mesh, and the device that it computes on."""

    groups: MeshGroups
    device: torch.device

    @classmethod
    def of(cls, mesh: Mesh, device: torch.device) -> "RankContext":
        """This rank's context on `mesh`; every rank of the job calls it, inside the process group."""
        return cls(MeshGroups.build(mesh), device)

    @property
    def mesh(self) -> Mesh:
        """The mesh of the job's ranks."""
        return self.groups.mesh

    @property
    def rank(self) -> int:
        """Rank in the job."""
        return self.groups.global_rank

    @property
    def dp_rank(self) -> int:
        """Rank among those with other samples."""
        return self.groups.data.rank
