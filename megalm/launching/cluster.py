"""What SLURM says of its partitions, asked before a job is submitted."""

import re
import subprocess
from dataclasses import dataclass

from megalm.config.merging.suggest import did_you_mean
from megalm.errors import ConfigError, PlatformError
from megalm.launching.job import Job, time_seconds


@dataclass(frozen=True)
class Partition:
    """A partition: how many nodes it has, what the largest of them has, and how long a job may last."""

    nodes: int = 0
    gpus: int = 0
    cpus: int = 0
    limit: str = "infinite"
    """As SLURM writes it."""

    def joined(self, other: "Partition") -> "Partition":
        """This one with nodes of another kind."""
        return Partition(self.nodes + other.nodes, max(self.gpus, other.gpus), max(self.cpus, other.cpus), other.limit)


def slurm_command(*words: str) -> str:
    """The output of one of SLURM's commands.

    Raises:
        PlatformError: it is not installed, or it fails; the text is SLURM's own.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
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
    for line in slurm_command("sinfo", "--noheader", "--exact", "--format=%P|%D|%c|%l|%G").splitlines():
        name, nodes, cpus, limit, resources = line.split("|", 4)
        if name.endswith("*"):
            default = name = name.removesuffix("*")
        gpus = max([int(count) for count in re.findall(r"gpu:(?:[^:,()]+:)?(\d+)", resources)], default=0)
        found[name] = found.get(name, Partition()).joined(Partition(int(nodes), gpus, int(cpus), limit))
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


def _problems(job: Job, name: str, found: Partition) -> list[str]:
    """What a partition does not have for a job, which SLURM would leave in the queue without a word."""
    problems = []
    if job.nodes > found.nodes:
        problems.append(f"--nodes {job.nodes} but partition {name} has {found.nodes}; ask for at most {found.nodes}")
    if found.gpus and job.gpus_per_node > found.gpus:
        problems.append(
            f"--gpus-per-node {job.gpus_per_node} but the nodes of partition {name} have {found.gpus}; ask for at most "
            f"{found.gpus}"
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
