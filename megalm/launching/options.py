"""The flags of `megalm submit`: which there are, and which launcher takes which."""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from megalm.config.paths import path_argument
from megalm.config.ranges import Range
from megalm.errors import ConfigError
from megalm.launching.commands import LAUNCHERS
from megalm.launching.job import IDLE_STARTS
from megalm.launching.site import Site

SCRIPT = "launch/pretrain_gpt.py"
MODULE = f"megalm.{Path(SCRIPT).stem}"
"""What the ranks run where there is no checkout; it does the same."""
SITE_OPTIONS = (
    "partition", "account", "qos", "constraint", "mem", "sbatch", "network_interface", "container_image",
    "container_mounts", "container_runtime",
)  # fmt: skip
_SHORT = {"partition": "-p", "account": "-A", "qos": "-q", "constraint": "-C"}
_TAKEN_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("job_name", "signal_before", "no_requeue", "max_idle_starts", "chain", "sweep"), ("slurm",)),
    **dict.fromkeys(("array_limit", "container_image", "container_mounts", "container_runtime"), ("slurm",)),
    **dict.fromkeys(("time", "cpus_per_task", "mem", "sbatch"), ("slurm", "srun")),
    **dict.fromkeys(("partition", "account", "qos", "constraint"), ("slurm", "srun")),
    "hostfile": ("deepspeed", "mpirun"),
    "node_rank": ("torchrun",),
    **dict.fromkeys(("master_addr", "master_port"), ("deepspeed", "torchrun")),
}
"""The launchers that take an option; all do where none are named."""
_INSTEAD = {
    "cpus_per_task": "OMP_NUM_THREADS sets the threads of a rank",
    "time": "--exit-duration-in-mins ends a run",
    "master_addr": "megalm finds out by itself where its ranks meet",
    "master_port": "megalm finds out by itself where its ranks meet",
    "hostfile": "srun and SLURM know the nodes; torchrun is started on each",
}


@dataclass(frozen=True)
class Gpus:
    """What --gpus-per-node asks for."""

    count: int = 0
    kind: str | None = None
    """The type, as SLURM names it; None: any."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """`4`, or with a type `h100:4`.

        Raises:
            argparse.ArgumentTypeError: anything else.
        """
        found = re.fullmatch(r"(?:([A-Za-z][\w.-]*):)?(\d{1,9})", text)
        if not found:
            raise argparse.ArgumentTypeError(f'must be a number, or TYPE:NUMBER such as h100:4, not "{text}"')
        return cls(int(found[2]), found[1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything else on the command line is a flag of the training script."""
    parser.allow_abbrev = False
    parser.epilog = (
        "All other flags are those of the training script (--save, --train-iters, ...), checked before anything is "
        "submitted. Other options of sbatch: --sbatch=--exclusive, --sbatch=--exclude=n7, ... docs/cluster.md walks "
        "through it."
    )
    add = parser.add_argument
    add("--config", action="append", default=[], metavar="FILE", type=path_argument, help="recipe of the run, as for "
        "the training script")  # fmt: skip
    add("--script", default=SCRIPT if Path(SCRIPT).is_file() else MODULE, metavar="FILE", type=path_argument,
        help=f"training script, or a module's name (default: {SCRIPT} where it exists, else {MODULE})")  # fmt: skip
    add("--launcher", choices=LAUNCHERS, default="slurm", help="slurm submits a batch script; the others start the "
        "ranks now, by one command, which is printed (default: %(default)s)")  # fmt: skip
    add("--dry-run", action="store_true", help="print the batch script or the command, and do nothing")
    size = parser.add_argument_group("size")
    size.add_argument("-N", "--nodes", type=_positive, default=1, metavar="N", help="nodes (default: %(default)s)")
    size.add_argument("--gpus-per-node", type=Gpus.parse, default=Gpus(), metavar="[TYPE:]G", help="GPUs of each node, "
                      "one rank on each; 0 on CPU nodes; with a type that SLURM knows: h100:4")  # fmt: skip
    size.add_argument("--ntasks-per-node", type=_positive, metavar="K", help="ranks on each node (default: G, else 1)")
    size.add_argument("-c", "--cpus-per-task", type=_positive, metavar="C", help="cores of each rank (default: its "
                      "share of the node's, by GPUs; of all where there are none)")  # fmt: skip
    size.add_argument("-t", "--time", metavar="T", help="time limit of one start: minutes, HH:MM:SS or DAYS-HH:MM:SS")
    _add_job(parser.add_argument_group("SLURM job"))
    _add_site(parser.add_argument_group("site", "From the site file; each option here overrides its key there."))
    hosts = parser.add_argument_group("hosts, without a scheduler")
    hosts.add_argument("--hostfile", type=path_argument, metavar="FILE", help="lines such as: node1 slots=8")
    hosts.add_argument("--node-rank", type=_count, metavar="R", help="torchrun: which of the nodes this is")
    hosts.add_argument("--master-addr", metavar="HOST", help="the first node's name or address")
    hosts.add_argument("--master-port", type=_positive, metavar="PORT", help="a free port of the first node")


def _add_job(group: Any) -> None:
    group.add_argument("-J", "--job-name", metavar="NAME", help="default: the name of the run folder")
    group.add_argument("--signal-before", type=_positive, metavar="S", help="seconds before the time limit at which "
                       "the ranks are told to save and stop (default: 300, at most a quarter of the time)")  # fmt: skip
    group.add_argument("--no-requeue", action="store_true", help="do not queue again at the time limit, "
                       "preemption or a node's failure")  # fmt: skip
    group.add_argument("--max-idle-starts", type=_positive, default=IDLE_STARTS, metavar="K", help="stop after K "
                       "starts in a row without a new checkpoint (default: %(default)s)")  # fmt: skip
    group.add_argument("--chain", type=_positive, default=1, metavar="L", help="submit L jobs, each after the end of "
                       "the one before (afterany), instead of requeueing")  # fmt: skip
    group.add_argument("--sweep", action="append", default=[], metavar="FLAG=V1,V2", help="a job array with a run for "
                       "each value; given several times, for each combination")  # fmt: skip
    group.add_argument("--array-limit", type=_positive, metavar="M", help="runs of a sweep at the same time")


def _add_site(group: Any) -> None:
    group.add_argument("--site", metavar="FILE", type=path_argument, help="YAML file about the cluster (default: "
                       "$MEGALM_SITE)")  # fmt: skip
    for name in SITE_OPTIONS:
        field = Site.model_fields[name]
        text = " ".join((field.description or "").split()).replace("%", "%%")
        kind: dict[str, Any] = {"metavar": "X"}
        if name in ("sbatch", "container_mounts"):
            kind["action"] = "append"
        if name == "container_runtime":
            kind = {"choices": ("pyxis", "apptainer")}
        names = [_SHORT[name]] if name in _SHORT else []
        group.add_argument(*names, "--" + name.replace("_", "-"), help=text, **kind)


def check_launcher(arguments: argparse.Namespace) -> None:
    """Every option given is one that the launcher takes.

    Raises:
        ConfigError: those that are not.
    """
    parser, launcher = argparse.ArgumentParser(), arguments.launcher
    add_arguments(parser)
    problems = []
    for name, launchers in _TAKEN_BY.items():
        if launcher not in launchers and getattr(arguments, name) != parser.get_default(name):
            flag, instead = "--" + name.replace("_", "-"), _INSTEAD.get(name, "leave it out")
            problems.append(
                f"{flag} says nothing to --launcher {launcher}, only to {' and '.join(launchers)}; {instead}"
            )
    gpus: Gpus = arguments.gpus_per_node
    if gpus.kind and launcher not in ("slurm", "srun"):
        problems.append(
            f"--gpus-per-node {gpus.kind}:{gpus.count} names a type, which says nothing to --launcher {launcher}, only "
            f"to slurm and srun; give {gpus.count}"
        )
    if problems:
        raise ConfigError(problems)


def _positive(text: str) -> int:
    return int(Range(1)(text))


def _count(text: str) -> int:
    return int(Range(0)(text))
