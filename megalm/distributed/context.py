"""What a process of a job is: its rank on the mesh, its groups and its device; and how it becomes that."""

from dataclasses import dataclass

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from megalm.config.parallel import ParallelConfig
from megalm.distributed.environment import LaunchEnvironment, choose_accelerator
from megalm.distributed.groups import MeshGroups
from megalm.distributed.mesh import Mesh
from megalm.distributed.process_group import default_backend, rank_device, start_process_group


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


def chosen_device(parallel: ParallelConfig, environment: LaunchEnvironment) -> torch.device:
    """The device of this rank, which DeepSpeed is told of before it is imported.

    Raises:
        PlatformError: there are more ranks on this machine than GPUs.
    """
    backend = parallel.distributed_backend or default_backend()
    choose_accelerator(backend == "nccl")
    return rank_device(environment, backend)


def join_job(
    parallel: ParallelConfig, environment: LaunchEnvironment, device: torch.device, store: Store | None = None
) -> RankContext:
    """Join the other ranks of the job, which meet in `store` (default: opened here); this rank's context.

    Raises:
        PlatformError: the ranks do not meet in time.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = parallel.distributed_backend or default_backend()
    start_process_group(environment, backend, parallel.distributed_timeout_minutes, store)
    return RankContext.of(Mesh.of_config(parallel, environment.world_size), device)
