"""What the launcher tells a process about its place in the job. The only reader of `os.environ` in megalm."""

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from megalm.errors import PlatformError

_LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class LaunchEnvironment:
    """One process's place in the job, and where the job's ranks meet."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that speaks for the job."""
        return self.rank == 0


def read_environment(environ: Mapping[str, str] | None = None) -> LaunchEnvironment:
    """The launch environment: the deepspeed launcher's or torchrun's variables, those of srun, or a single process.

    Raises:
        PlatformError: incomplete or contradictory variables, or many tasks that do not know of each other.
    """
    environ = os.environ if environ is None else environ
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "deepspeed"
    if "RANK" not in environ and "SLURM_STEP_NUM_TASKS" in environ and "MASTER_ADDR" in environ:
        launcher, environ = "srun", {**environ, **_slurm_variables(environ)}
    present = [name for name in _LAUNCH_VARIABLES if name in environ]
    if not present:
        return _single_process(environ)
    missing = [name for name in _LAUNCH_VARIABLES if name not in environ]
    if missing:
        raise PlatformError(
            f"the environment has {', '.join(present)} but not {', '.join(missing)}; start with "
            "`deepspeed launch/pretrain_gpt.py ...` or torchrun, or unset them to run one process"
        )
    rank, world_size, local_rank, port = (
        _integer(environ, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    )
    if not 0 <= rank < world_size:
        raise PlatformError(f"RANK={rank} must be at least 0 and below WORLD_SIZE={world_size}; fix the launch command")
    local_size_name = "LOCAL_WORLD_SIZE" if launcher == "torchrun" else "LOCAL_SIZE"
    local_world_size = _integer(environ, local_size_name) if local_size_name in environ else world_size
    if not 0 <= local_rank < local_world_size:
        raise PlatformError(
            f"LOCAL_RANK={local_rank} must be at least 0 and below {local_size_name}={local_world_size}; "
            "fix the launch command"
        )
    return LaunchEnvironment(
        launcher=launcher,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        master_addr=environ["MASTER_ADDR"],
        master_port=port,
    )


def _slurm_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """A task of `srun` as the launchers would describe it; the batch script says where the ranks meet (MASTER_*).

    Tasks, not hosts, are counted: several slurmd on one machine share its host name.
    """
    counts: list[str] = []
    for part in environ["SLURM_STEP_TASKS_PER_NODE"].split(","):  # as "4(x2),3": two nodes with 4, one with 3
        count, _, times = part.rstrip(")").partition("(x")
        counts += [count] * int(times or 1)
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_SIZE": counts[int(environ["SLURM_NODEID"])],
    }


def _single_process(environ: Mapping[str, str]) -> LaunchEnvironment:
    # not SLURM_NTASKS: an sbatch script is one process and has it too (and SLURM_PROCID=0); only srun sets the step's
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if environ.get(name, "1") not in ("", "1"):
            raise PlatformError(
                f"{name}={environ[name]} but RANK and WORLD_SIZE are not set: each task would train alone; "
                "under srun export MASTER_ADDR and MASTER_PORT first (launch/slurm/pretrain_gpt.sbatch does), else "
                "start one `deepspeed` or `torchrun` per node"
            )
    return LaunchEnvironment(
        launcher="none", rank=0, world_size=1, local_rank=0, local_world_size=1, master_addr="127.0.0.1", master_port=0
    )


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise PlatformError(f"{name}={environ[name]!r} in the environment must be a whole number") from None


def prepare_process(environment: LaunchEnvironment, environ: MutableMapping[str, str] | None = None) -> int:
    """Set what torch and DeepSpeed read from the environment when they are imported; call before importing them.

    Returns:
        The number of CPU threads for this rank: OMP_NUM_THREADS if the user set it, else an equal share of the cores.
    """
    environ = os.environ if environ is None else environ
    # deepspeed.comm falls back to MPI discovery unless all of these are set
    environ["RANK"] = str(environment.rank)
    environ["WORLD_SIZE"] = str(environment.world_size)
    environ["LOCAL_RANK"] = str(environment.local_rank)
    environ["MASTER_ADDR"] = environment.master_addr
    environ["MASTER_PORT"] = str(environment.master_port)
    given = environ.get("OMP_NUM_THREADS", "")
    threads = int(given) if given.isdigit() and int(given) > 0 else 0
    if not threads:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // environment.local_world_size)
        environ["OMP_NUM_THREADS"] = str(threads)
    return threads


def choose_accelerator(cuda: bool, environ: MutableMapping[str, str] | None = None) -> None:
    """Tell DeepSpeed which accelerator to use, before it is imported (else it guesses and warns)."""
    environ = os.environ if environ is None else environ
    environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")


def environment_with(before_path: str = "", **variables: str) -> dict[str, str]:
    """This process's environment with more variables, for a child process; `before_path` goes in front of PATH."""
    return {**os.environ, **variables, "PATH": before_path + os.environ.get("PATH", os.defpath)}
