"""What SLURM says of its partitions, asked before a job is submitted."""

import re
import subprocess
from dataclasses import dataclass

from megalm.config.suggest import did_you_mean
from megalm.errors import ConfigError, PlatformError


@dataclass(frozen=True)
class Partition:
    """A partition: how many nodes it has, and how many GPUs the largest of them."""

    nodes: int
    gpus: int
    default: bool


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


def partitions() -> dict[str, Partition]:
    """The partitions of the cluster by name.

    Raises:
        PlatformError: SLURM does not answer.
    """
    found: dict[str, Partition] = {}
    for line in slurm_command("sinfo", "--noheader", "--format=%P|%D|%G").splitlines():
        name, nodes, resources = line.split("|", 2)
        default, name = name.endswith("*"), name.removesuffix("*")
        gpus = max([int(count) for count in re.findall(r"gpu:(?:[^:,()]+:)?(\d+)", resources)], default=0)
        before = found.get(name, Partition(0, 0, default))
        found[name] = Partition(before.nodes + int(nodes), max(before.gpus, gpus), default)
    return found


def check_request(partition: str | None, nodes: int, gpus_per_node: int) -> Partition:
    """The partition that a job will get, if it has the nodes and GPUs asked for. A partition that declares no GPUs at
    all may still be asked: its nodes are taken to manage theirs without SLURM.

    Raises:
        ConfigError: no such partition, or too few nodes or GPUs.
        PlatformError: SLURM does not answer.
    """
    known = partitions()
    if partition is None:
        chosen = next((name for name, found in known.items() if found.default), None)
        if chosen is None:
            raise ConfigError(f"the cluster has no default partition; give --partition, one of {', '.join(known)}")
    elif partition not in known:
        hint = did_you_mean(partition, known) or f"; there are {', '.join(known)}"
        raise ConfigError(f"--partition {partition} is unknown{hint}")
    else:
        chosen = partition
    found = known[chosen]
    if nodes > found.nodes:
        raise ConfigError(f"--nodes {nodes} but partition {chosen} has {found.nodes}; ask for at most {found.nodes}")
    if found.gpus and gpus_per_node > found.gpus:
        raise ConfigError(
            f"--gpus-per-node {gpus_per_node} but the nodes of partition {chosen} have {found.gpus}; ask for at most "
            f"{found.gpus}"
        )
    return found
