"""Starting and ending the process group in which the ranks talk."""

from datetime import timedelta

import torch
import torch.distributed as dist

from megalm.dist.environment import LaunchEnvironment
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


def start_process_group(environment: LaunchEnvironment, backend: str, timeout_minutes: float) -> None:
    """Join the job's process group.

    Raises:
        PlatformError: the ranks do not meet within the time limit.
    """
    timeout = timedelta(minutes=timeout_minutes)
    if environment.world_size == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    try:
        dist.init_process_group(
            backend,
            init_method=f"tcp://{environment.master_addr}:{environment.master_port}",
            rank=environment.rank,
            world_size=environment.world_size,
            timeout=timeout,
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise PlatformError(
            f"rank {environment.rank} of {environment.world_size} could not join the others at "
            f"{environment.master_addr}:{environment.master_port} within {timeout_minutes:g} minutes: "
            f"{str(error).splitlines()[0]}; check that the address is reachable and the port is free "
            "(--master_port of the launcher)"
        ) from error


def stop_process_group() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
