"""The exact command line of each launcher for a job. What is printed is what runs."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from megalm.errors import ConfigError, PlatformError
from megalm.launching.job import Job, program
from megalm.storage.documents import read_settings
from megalm.storage.faults import reason_of

LAUNCHERS = ("slurm", "srun", "deepspeed", "torchrun", "mpirun", "local")
"""slurm writes and submits a batch script; the others start the ranks now, each by one command."""


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """Where launchers without a scheduler start ranks."""

    hostfile: Path | None = None
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int | None = None


def commands(launcher: str, job: Job, hosts: Hosts, mpi: str = "openmpi") -> list[list[str]]:
    """The command that starts the job's ranks; of torchrun on several nodes, the command of each node.

    Raises:
        ConfigError: the launcher needs to know more.
    """
    training = job.training_command(job.elements[0], "--module" if launcher == "deepspeed" else "-m")
    if launcher == "srun":
        return [_srun(job, training)]
    if launcher == "deepspeed":
        return [_deepspeed(job, hosts, training)]
    if launcher == "mpirun":
        return [_mpirun(job, hosts, training, mpi)]
    if launcher == "torchrun":
        return _torchrun(job, hosts, training)
    if job.nodes > 1:
        raise ConfigError(f"--launcher local starts ranks on this machine only, not on --nodes {job.nodes}")
    if job.ranks == 1:
        return [[job.python, "-u", *training]]
    return [[program("torchrun"), "--standalone", "--nproc-per-node", str(job.ranks), *training]]


def _srun(job: Job, training: list[str]) -> list[str]:
    site = job.site
    optional = {
        "gpus-per-node": job.gpus_asked or None,
        "cpus-per-task": job.cpus_per_task,
        "mem": job.mem,
        "time": job.time,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
    }
    asked = [f"--{name}={value}" for name, value in optional.items() if value is not None]
    placed = [f"--nodes={job.nodes}", f"--ntasks-per-node={job.ranks_per_node}"]
    return ["srun", *placed, *asked, "--kill-on-bad-exit=1", *site.sbatch, job.python, "-u", *training]


def _deepspeed(job: Job, hosts: Hosts, training: list[str]) -> list[str]:
    port = ["--master_port", str(hosts.master_port)] if hosts.master_port else []
    if job.nodes == 1 and hosts.hostfile is None:
        return [program("deepspeed"), "--num_accelerators", str(job.ranks), *port, *training]
    if hosts.hostfile is None:
        raise ConfigError(
            f"--launcher deepspeed on --nodes {job.nodes} needs --hostfile FILE with lines such as: node1 slots=8"
        )
    slots = read_hostfile(hosts.hostfile)
    _check_slots(job, slots, hosts.hostfile)
    address = ["--master_addr", hosts.master_addr] if hosts.master_addr else []
    asked = ["--num_nodes", str(job.nodes), "--num_gpus", str(job.ranks_per_node)]
    force = ["--force_multi"] if job.nodes == 1 else []
    return [program("deepspeed"), "--hostfile", str(hosts.hostfile), *asked, *force, *address, *port, *training]


def _torchrun(job: Job, hosts: Hosts, training: list[str]) -> list[list[str]]:
    address, port = hosts.master_addr or "127.0.0.1", hosts.master_port or _port(job)
    if job.nodes > 1 and hosts.master_addr is None:
        raise ConfigError(
            f"--launcher torchrun on --nodes {job.nodes} needs --master-addr HOST, the first node's name or address"
        )
    nodes = range(job.nodes) if hosts.node_rank is None else [hosts.node_rank]
    if hosts.node_rank is not None and not 0 <= hosts.node_rank < job.nodes:
        raise ConfigError(f"--node-rank {hosts.node_rank} must be at least 0 and below --nodes {job.nodes}")
    return [
        [
            program("torchrun"), "--nnodes", str(job.nodes), "--node-rank", str(node), "--nproc-per-node",
            str(job.ranks_per_node), "--master-addr", address, "--master-port", str(port), *training,
        ]
        for node in nodes
    ]  # fmt: skip


def _mpirun(job: Job, hosts: Hosts, training: list[str], mpi: str) -> list[str]:
    slots = read_hostfile(hosts.hostfile) if hosts.hostfile else None
    if slots is None and job.nodes > 1:
        raise ConfigError(
            f"--launcher mpirun on --nodes {job.nodes} needs --hostfile FILE with lines such as: node1 slots=8"
        )
    if slots is not None and hosts.hostfile is not None:
        _check_slots(job, slots, hosts.hostfile)
    variables = job.site.variables()
    names = list(slots or {"localhost": 0})[: job.nodes]
    if mpi == "mpich":
        where = ["-ppn", str(job.ranks_per_node), *(["-hosts", ",".join(names)] if slots else [])]
        exported = [word for name, value in variables.items() for word in ("-genv", name, value)]
    else:
        root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
        # ranks have threads: no binding to a core; without a hostfile OpenMPI would count the cores as slots
        named = [f"{name}:{job.ranks_per_node}" for name in names]
        where = [*root, "--host", ",".join(named), "--bind-to", "none"]
        exported = [word for name, value in variables.items() for word in ("-x", f"{name}={value}")]
    return ["mpirun", "-n", str(job.ranks), *where, *exported, job.python, "-u", *training]


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host, in the order of a file of lines `host slots=8` (# starts a comment).

    Raises:
        ConfigError: it is missing, or a line is of another form.
    """
    try:
        lines = read_settings(path).decode().splitlines()
    except OSError as error:
        raise ConfigError(f"--hostfile {path} cannot be read: {reason_of(error, path)}; correct the path") from None
    except ValueError as error:
        raise ConfigError(f"--hostfile {path} is none: {error}; write lines such as node1 slots=8") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        count = words[1].removeprefix("slots=") if len(words) == 2 and words[1].startswith("slots=") else ""
        if not count.isdecimal() or len(count) > 9 or words[0].startswith("-") or words[0] in slots:
            raise ConfigError(f"{path}:{number}: {line.strip()!r} must be a host, once, and its slots: node1 slots=8")
        slots[words[0]] = int(count)
    return slots


def _check_slots(job: Job, slots: dict[str, int], path: Path) -> None:
    if job.nodes > len(slots):
        raise ConfigError(f"--nodes {job.nodes} but {path} has {len(slots)} hosts; add hosts or ask for fewer nodes")
    small = [f"{host} slots={count}" for host, count in list(slots.items())[: job.nodes] if count < job.ranks_per_node]
    if small:
        raise ConfigError(f"{job.ranks_per_node} ranks a node, but {path} has {', '.join(small)}; correct one of them")


def _port(job: Job) -> int:
    """A port for torchrun: free here if this is the only node, else the usual one, which all nodes know."""
    if job.nodes > 1:
        return 29500
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def which_mpi(version: str) -> str:
    """`openmpi` or `mpich` from what `mpirun --version` says.

    Raises:
        PlatformError: it is neither.
    """
    if "Open MPI" in version or "OpenRTE" in version:
        return "openmpi"
    if "HYDRA" in version or "MPICH" in version or "Intel(R) MPI" in version:
        return "mpich"
    first = (version.splitlines() or ["nothing"])[0]
    raise PlatformError(f"mpirun --version says {first!r}; megalm knows OpenMPI, MPICH and Intel MPI")
