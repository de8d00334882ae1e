"""What SLURM says of its partitions, asked before a job is submitted."""

import math
import re
import subprocess
from dataclasses import dataclass, replace
from fractions import Fraction

from megalm.config.merging.suggest import did_you_mean
from megalm.distributed.environment import environment_without
from megalm.errors import ConfigError, PlatformError
from megalm.launching.job import Job, time_seconds
from megalm.launching.sbatch import sbatch_option


@dataclass(frozen=True)
class NodeKind:
    """Nodes that are alike, and what each of them has."""

    nodes: int
    gpus: int
    """Of the type of which it has most."""
    cpus: int
    threads_per_core: int = 1
    memory_mb: int = 0
    gpu_types: tuple[tuple[str, int], ...] = ()
    """How many there are of each type that has a name."""

    def gpus_of(self, kind: str | None) -> int:
        """How many GPUs it has of a type; None: of any one."""
        return self.gpus if kind is None else dict(self.gpu_types).get(kind, 0)


@dataclass(frozen=True)
class Partition:
    """A partition: its nodes, and how long a job may last."""

    limit: str
    """As SLURM writes it."""
    kinds: tuple[NodeKind, ...] = ()

    @property
    def nodes(self) -> int:
        """How many there are."""
        return sum(kind.nodes for kind in self.kinds)

    @property
    def gpus(self) -> int:
        """Of the nodes that have most."""
        return self.gpus_of(None)

    def gpus_of(self, kind: str | None) -> int:
        """Of a type (None: any one), of the nodes that have most."""
        return max((node.gpus_of(kind) for node in self.kinds), default=0)

    @property
    def gpu_types(self) -> list[str]:
        """Names of the types of GPUs, in order."""
        return sorted({name for kind in self.kinds for name, _ in kind.gpu_types})

    @property
    def cpus(self) -> int:
        """Of the nodes that have most."""
        return max((kind.cpus for kind in self.kinds), default=0)


def slurm_command(*words: str) -> str:
    """The output of one of SLURM's commands. SBATCH_* of the shell do not count: they would override the script.

    Raises:
        PlatformError: it is not installed, or it fails; the text is SLURM's own.
    """
    environ, _ = environment_without("SBATCH_")
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environ)
    except FileNotFoundError:
        raise PlatformError(
            f"{words[0]} is not on PATH: this machine has no SLURM; submit from a login node, look at the script with "
            "--dry-run, or start here with --launcher deepspeed, torchrun, mpirun or local"
        ) from None
    except subprocess.TimeoutExpired:
        raise PlatformError(
            f"{words[0]} did not answer within two minutes; is the controller up (scontrol ping)?"
        ) from None
    if done.returncode:
        text = " ".join((done.stderr or done.stdout).split())
        raise PlatformError(f"{words[0]} refused (exit code {done.returncode}): {text}")
    return done.stdout.strip()


def partitions() -> tuple[dict[str, Partition], str | None]:
    """The partitions of the cluster by name, and the name of the default one.

    Raises:
        PlatformError: SLURM does not answer.
    """
    found: dict[str, Partition] = {}
    default = None
    for line in slurm_command("sinfo", "--noheader", "--exact", "--format=%P|%D|%c|%Z|%m|%l|%G").splitlines():
        name, nodes, cpus, threads, memory, limit, resources = line.split("|", 6)
        if name.endswith("*"):
            default = name = name.removesuffix("*")
        gpus = [(name, int(count)) for name, count in re.findall(r"gpu:(?:([^:,()]+):)?(\d+)", resources)]
        most = max((count for _, count in gpus), default=0)
        cores, per_core, megabytes = (int(re.sub(r"\D.*", "", text) or 0) for text in (cpus, threads, memory))
        types = tuple((name, count) for name, count in gpus if name)
        kind = NodeKind(int(nodes), most, cores, per_core, megabytes, types)
        found[name] = Partition(limit, (*(found[name].kinds if name in found else ()), kind))
    return found, default


def check_request(job: Job) -> Partition:
    """The partition that a job will get, if it has what the job asks for. A partition that declares no GPUs at all may
    still be asked: its nodes are taken to manage theirs without SLURM.

    Raises:
        ConfigError: no such partition, or one in which the job would wait for ever.
        PlatformError: SLURM does not answer.
    """
    known, default = partitions()
    chosen = job.site.partition or default
    if chosen is None:
        raise ConfigError(f"the cluster has no default partition; give --partition, one of {', '.join(known)}")
    names = chosen.split(",")
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
            raise ConfigError(f"--partition {name} is unknown{hint}")
    # of several SLURM takes the first that is free: the job must fit into one of them
    problems = {name: _problems(job, name, known[name]) for name in names}
    fitting = next((name for name in names if not problems[name]), None)
    if fitting is None:
        raise ConfigError(problems[names[0]])
    return known[fitting]


def with_defaults(job: Job, partition: Partition) -> Job:
    """The job with cores and memory, which SLURM gives sparingly to who does not ask: the ranks' share of the smallest
    node that has what the job asks for, by its GPUs; the whole node where it asks for none.
    """
    options = {sbatch_option(option)[0] for option in job.site.sbatch}
    cores_known = job.cpus_per_task is not None or options & {"cpus-per-gpu", "overcommit", "ntasks-per-core"}
    memory_known = job.mem is not None or options & {"mem", "mem-per-cpu", "mem-per-gpu"}
    asked = job.ranks_per_node * (job.cpus_per_task or 1)
    shares = [
        _share(job, kind, exclusive="exclusive" in options)
        for kind in partition.kinds
        if kind.gpus_of(job.gpu_type) >= job.gpus_per_node and kind.cpus >= asked
    ]
    if not shares:
        return job
    cores, memory_mb = (min(amounts) for amounts in zip(*shares, strict=True))
    memory = "0" if memory_mb == math.inf else f"{memory_mb:.0f}M"
    return replace(
        job,
        cpus_per_task=job.cpus_per_task if cores_known else int(cores),
        mem=job.mem if memory_known or memory_mb <= 1 else memory,  # 1 MB: the cluster does not say what its nodes have
    )


def _share(job: Job, kind: NodeKind, *, exclusive: bool) -> tuple[int, float]:
    """Cores of each rank, and MB of memory of a node (inf: all of it), that belong to a job on one kind of node."""
    by_cores = Fraction(job.ranks_per_node * (job.cpus_per_task or 0), kind.cpus)
    by_gpus = Fraction(job.gpus_per_node, kind.gpus_of(job.gpu_type)) if job.gpus_per_node else Fraction(0)
    share = max(by_cores, by_gpus) or Fraction(1)
    whole_cores = max(kind.threads_per_core, 1)
    cores = int(kind.cpus * share) // job.ranks_per_node // whole_cores * whole_cores or 1
    return cores, math.inf if share == 1 or exclusive else int(kind.memory_mb * share)


def _problems(job: Job, name: str, found: Partition) -> list[str]:
    """What a partition does not have for a job, which SLURM would leave in the queue without a word."""
    problems = []
    if job.nodes > found.nodes:
        problems.append(f"--nodes {job.nodes} but partition {name} has {found.nodes}; ask for at most {found.nodes}")
    available = found.gpus_of(job.gpu_type)
    if found.gpus and job.gpu_type and not available:
        there = f"those of {' or '.join(found.gpu_types)}" if found.gpu_types else "GPUs without a type"
        problems.append(
            f"--gpus-per-node {job.gpus_asked} but the nodes of partition {name} have no {job.gpu_type}; ask for "
            f"{there}, or for another --partition"
        )
    elif found.gpus and job.gpus_per_node > available:
        problems.append(
            f"--gpus-per-node {job.gpus_asked} but the nodes of partition {name} have {available}; ask for at most "
            f"{available}"
        )
    cores = job.ranks_per_node * (job.cpus_per_task or 1)
    if cores > found.cpus and not any("overcommit" in option for option in job.site.sbatch):
        problems.append(
            f"{job.ranks_per_node} ranks a node x --cpus-per-task {job.cpus_per_task or 1} need {cores} cores, but the "
            f"nodes of partition {name} have {found.cpus}; ask for fewer (--ntasks-per-node, --cpus-per-task)"
        )
    # a quality of service may lift the limit
    limited = job.time is not None and found.limit[:1].isdigit() and job.site.qos is None
    if limited and time_seconds(str(job.time)) > time_seconds(found.limit):
        problems.append(
            f"--time {job.time} but a job of partition {name} may last {found.limit}; ask for at most that: the job "
            "queues again and the run goes on"
        )
    return problems
