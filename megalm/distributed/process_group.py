"""Starting and ending the process group in which the ranks talk."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store, distributed_c10d  # type: ignore[attr-defined]

from megalm.distributed.environment import LaunchEnvironment
from megalm.distributed.rendezvous import open_store
from megalm.errors import PlatformError


def default_backend() -> str:
    """nccl where CUDA is, else gloo."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def rank_device(environment: LaunchEnvironment, backend: str) -> torch.device:
    """The device of this rank: its own GPU under nccl, else the CPU.

    Raises:
        PlatformError: more ranks on this machine than GPUs.
    """
    if backend != "nccl":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if environment.local_rank >= count:
        raise PlatformError(
            f"local rank {environment.local_rank} has no GPU: this machine has {count}; start at most {count} ranks a "
            "node, or give --distributed-backend gloo to train on CPU"
        )
    return torch.device("cuda", environment.local_rank)


def start_process_group(
    environment: LaunchEnvironment, backend: str, timeout_minutes: float, store: Store | None = None
) -> None:
    """Join the job's process group, whose ranks meet in `store` (default: opened here).

    Raises:
        PlatformError: the ranks do not meet within the time limit.
    """
    timeout = timedelta(minutes=timeout_minutes)
    use_timeout_everywhere(timeout)
    rank, world_size = environment.rank, environment.world_size
    if world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)  # type: ignore[attr-defined]
        return
    meeting = f"{environment.master_addr}:{environment.master_port}"
    try:
        store = store or open_store(environment, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise PlatformError(
            f"rank {rank} of {world_size} could not join the others at {meeting} within {timeout_minutes:g} minutes: "
            f"{str(error).splitlines()[0]}; check that every rank was started, and that the address is reachable "
            "(GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose the network)"
        ) from error


def use_timeout_everywhere(timeout: timedelta) -> None:
    """Let every process group that is made from now on, by megalm, DeepSpeed or torch, have this time limit.

    torch gives a group that is made without one its own default of 10 or 30 minutes, not that of the job.
    """
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]


def stop_process_group() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
