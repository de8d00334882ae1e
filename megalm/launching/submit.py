"""`megalm submit`: a training command as a SLURM job, or by another launcher. All is checked first."""

import argparse
import importlib.util
import itertools
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megalm.config import RunConfig, build_parser, check_layout, load
from megalm.config.merging.suggest import did_you_mean
from megalm.config.ranges import Range
from megalm.distributed.environment import captured_environment, user_variable
from megalm.distributed.network import listens
from megalm.errors import ConfigError, PlatformError
from megalm.launching.cluster import check_request, slurm_command
from megalm.launching.commands import LAUNCHERS, Hosts, commands, which_mpi
from megalm.launching.job import IDLE_STARTS, Element, Job, time_seconds
from megalm.launching.script import batch_script
from megalm.launching.site import Site, read_site
from megalm.storage.durable import replace_text

TAKES_RUN_FLAGS = True
"""What this command does not know itself it hands to the training script."""
_SCRIPT = "launch/pretrain_gpt.py"
_MODULE = f"megalm.{Path(_SCRIPT).stem}"
"""What the ranks run where there is no checkout; it does the same."""
_SITE_OPTIONS = (
    "partition", "account", "qos", "constraint", "sbatch", "network_interface", "container_image", "container_mounts",
    "container_runtime",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything else on the command line is a flag of the training script."""
    parser.allow_abbrev = False
    parser.epilog = (
        "All other flags are those of the training script (--save, --train-iters, ...), checked before anything is "
        "submitted. docs/cluster.md walks through it."
    )
    add = parser.add_argument
    add("--config", action="append", default=[], metavar="FILE", help="recipe of the run, as for the training script")
    add("--script", default=_SCRIPT if Path(_SCRIPT).is_file() else _MODULE, metavar="FILE", help="training script, or "
        f"the name of a module (default: {_SCRIPT} where it exists, else {_MODULE})")  # fmt: skip
    add("--launcher", choices=LAUNCHERS, default="slurm", help="slurm submits a batch script; the others start the "
        "ranks now, by one command, which is printed (default: %(default)s)")  # fmt: skip
    add("--dry-run", action="store_true", help="print the batch script or the command, and do nothing")
    size = parser.add_argument_group("size")
    size.add_argument("--nodes", type=_positive, default=1, metavar="N", help="nodes (default: %(default)s)")
    size.add_argument("--gpus-per-node", type=_count, metavar="G", help="GPUs of each node, one rank on each; 0 on "
                      "CPU nodes")  # fmt: skip
    size.add_argument("--ntasks-per-node", type=_positive, metavar="K", help="ranks on each node (default: G, else 1)")
    size.add_argument("--cpus-per-task", type=_positive, metavar="C", help="cores of each rank")
    size.add_argument("--time", metavar="T", help="time limit of one start: minutes, HH:MM:SS or DAYS-HH:MM:SS")
    _add_job(parser.add_argument_group("SLURM job"))
    _add_site(parser.add_argument_group("site", "From the site file; each option here overrides its key there."))
    hosts = parser.add_argument_group("hosts, without a scheduler")
    hosts.add_argument("--hostfile", type=Path, metavar="FILE", help="lines such as: node1 slots=8")
    hosts.add_argument("--node-rank", type=_count, metavar="R", help="torchrun: which of the nodes this is")
    hosts.add_argument("--master-addr", metavar="HOST", help="the first node's name or address")
    hosts.add_argument("--master-port", type=_positive, metavar="PORT", help="a free port of the first node")


def _add_job(group: Any) -> None:
    group.add_argument("--job-name", metavar="NAME", help="default: the name of the run folder")
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
    group.add_argument("--site", metavar="FILE", help="YAML file about the cluster (default: $MEGALM_SITE)")
    for name in _SITE_OPTIONS:
        field = Site.model_fields[name]
        text = " ".join((field.description or "").split()).replace("%", "%%")
        kind: dict[str, Any] = {"metavar": "X"}
        if name in ("sbatch", "container_mounts"):
            kind["action"] = "append"
        if name == "container_runtime":
            kind = {"choices": ("pyxis", "apptainer")}
        group.add_argument("--" + name.replace("_", "-"), help=text, **kind)


def run(arguments: argparse.Namespace, run_flags: list[str]) -> int:
    """Check, then print, submit or start.

    Raises:
        ConfigError: the run, its layout or the request cannot be.
        PlatformError: SLURM or another launcher is missing or refuses.
    """
    job = describe(arguments, run_flags)
    if arguments.launcher != "slurm":
        return _start(arguments, job)
    job = _fitted(job, arguments.dry_run)
    path = job.folder / "slurm" / "job.sbatch"
    text = batch_script(job, str(path))
    if arguments.dry_run:
        print(text, end="")
        return 0
    _write(job, path, text)
    numbers = _submit(path, arguments.chain)
    print("\n".join(_after(job, path, numbers)))
    return 0


def _fitted(job: Job, dry_run: bool) -> Job:
    """The job as the cluster can take it; a dry run does without a cluster.

    Raises:
        ConfigError, PlatformError: the cluster has no such partition, or too little, or does not answer.
    """
    try:
        partition = check_request(job)
    except PlatformError as error:
        if not dry_run:
            raise
        print(f"note: not compared with a cluster: {error}", file=sys.stderr)
        return job
    if job.gpus_per_node and not partition.gpus:
        print("note: the partition declares no GPUs to SLURM, so none are asked for", file=sys.stderr)
        return replace(job, gpus_per_node=0)
    return job


def describe(arguments: argparse.Namespace, run_flags: list[str]) -> Job:
    """The job of a command line, checked as far as that is possible without a cluster.

    Raises:
        ConfigError: what is wrong with it.
    """
    if arguments.ntasks_per_node is None:
        arguments.ntasks_per_node = arguments.gpus_per_node or 1
    is_module = not Path(arguments.script).is_file()
    if is_module and not _is_importable(arguments.script):
        raise ConfigError(f"--script {arguments.script} does not exist; name a training script, or a module: {_MODULE}")
    submits = arguments.launcher == "slurm"
    flags = _training_flags(arguments, run_flags)
    elements, config = _elements(arguments, flags)
    if submits and config.checkpoint.save is None:
        raise ConfigError("a job needs a run folder on a file system that all nodes share; give --save DIR")
    if submits and arguments.time is None:
        raise ConfigError("--time is missing; give the time limit of one start, such as --time 24:00:00")
    if arguments.chain > 1 and config.checkpoint.fresh:
        raise ConfigError("--fresh and --chain exclude each other: every job of the chain would start from scratch")
    folder = Path(config.checkpoint.save or "").absolute()
    job = Job(
        script=arguments.script,
        flags=tuple(flags),
        nodes=arguments.nodes,
        ranks_per_node=arguments.ntasks_per_node,
        gpus_per_node=arguments.gpus_per_node or 0,
        folder=folder,
        elements=elements,
        directory=Path.cwd(),
        site=_site(arguments),
        time=arguments.time,
        name=arguments.job_name or folder.name,
        signal_before_s=_signal_before(arguments),
        requeue=not arguments.no_requeue and arguments.chain == 1,
        idle_starts=arguments.max_idle_starts,
        chained=arguments.chain > 1,
        fresh=config.checkpoint.fresh,
        array_limit=arguments.array_limit,
        cpus_per_task=arguments.cpus_per_task,
        environment=captured_environment(),
        is_module=is_module,
        command=shlex.join(["megalm", *(word for word in arguments.words if word != "--dry-run")]),
    )
    return job


def _is_importable(name: str) -> bool:
    """Whether this is a module's name; imports the packages above it."""
    try:
        return all(map(str.isidentifier, name.split("."))) and importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def _site(arguments: argparse.Namespace) -> Site:
    given = {name: getattr(arguments, name) for name in _SITE_OPTIONS}
    return read_site(arguments.site or user_variable("MEGALM_SITE"), given)


def _training_flags(arguments: argparse.Namespace, run_flags: list[str]) -> list[str]:
    """The training script's flags.

    Raises:
        ConfigError: a word that is neither an option of submit nor a flag of training, but close to an option.
    """
    rest = [word for word in run_flags if word != "--"]
    own = [name.replace("_", "-") for name in vars(arguments)]
    known = {option[2:] for option in build_parser()._option_string_actions if option.startswith("--")}
    for word in rest:
        name = word[2:].partition("=")[0].replace("_", "-")
        if word.startswith("--") and name not in known and (hint := did_you_mean(name, own, "--")):
            raise ConfigError(f"unknown option --{name}{hint}")
    recipes = [word for recipe in arguments.config for word in ("--config", recipe)]
    return recipes + rest


def _elements(arguments: argparse.Namespace, flags: list[str]) -> tuple[tuple[Element, ...], RunConfig]:
    """The runs of the job, each checked with its layout; `flags` loses --save and --fresh."""
    config = _checked(flags, arguments)
    _drop(flags, "--save", values=1)
    _drop(flags, "--fresh", values=0)
    folder = Path(config.checkpoint.save).absolute() if config.checkpoint.save else Path()
    if not arguments.sweep:
        if arguments.array_limit is not None:
            raise ConfigError("--array-limit is about the runs of a --sweep; give one, or drop it")
        return (Element(run=folder),), config
    if arguments.launcher != "slurm":
        raise ConfigError("--sweep is a SLURM job array; without SLURM start one run after the other")
    if arguments.chain > 1:
        raise ConfigError("--sweep and --chain exclude each other; the runs of a sweep requeue by themselves")
    axes = [_axis(text) for text in arguments.sweep]
    elements: list[Element] = []
    for values in itertools.product(*(axis[1] for axis in axes)):
        pairs = [(axis[0], value) for axis, value in zip(axes, values, strict=True)]
        chosen = tuple(word for name, value in pairs for word in (f"--{name}", value))
        run = folder / ",".join(f"{name}={value}" for name, value in pairs).replace("/", "_")
        _checked([*flags, *chosen, "--save", str(run)], arguments)
        if run in (element.run for element in elements):
            raise ConfigError(f"two runs of the sweep would share the folder {run}; sweep over other values")
        elements.append(Element(run=run, flags=chosen))
    return tuple(elements), config


def _checked(flags: Sequence[str], arguments: argparse.Namespace) -> RunConfig:
    config = load(flags, Path(arguments.script).name).config
    check_layout(config, arguments.nodes * arguments.ntasks_per_node)
    return config


def _axis(text: str) -> tuple[str, list[str]]:
    name, _, values = text.partition("=")
    found = [value for value in values.split(",") if value]
    if not name or not found or len(set(found)) < len(found):
        raise ConfigError(f"--sweep {text} must be a flag and different values for it: --sweep lr=1e-3,3e-4")
    return name.removeprefix("--").replace("_", "-"), found


def _drop(flags: list[str], name: str, values: int) -> None:
    """Take a flag and its values out."""
    while any(word.partition("=")[0] == name for word in flags):
        index = next(i for i, word in enumerate(flags) if word.partition("=")[0] == name)
        del flags[index : index + 1 + (0 if "=" in flags[index] else values)]


def _signal_before(arguments: argparse.Namespace) -> int:
    if arguments.time is None:
        return arguments.signal_before or 300
    limit = time_seconds(arguments.time)
    if limit <= 0:
        raise ConfigError(f"--time {arguments.time} must be more than nothing")
    if arguments.signal_before is None:
        return min(300, max(1, limit // 4))
    if arguments.signal_before >= limit:
        raise ConfigError(
            f"--signal-before {arguments.signal_before} must be less than the {limit} s of --time {arguments.time}; "
            "the ranks would be told to stop as soon as they start"
        )
    return int(arguments.signal_before)


def _write(job: Job, path: Path, text: str) -> None:
    try:
        for element in job.elements:
            (element.run / "slurm").mkdir(parents=True, exist_ok=True)
            (element.run / "slurm" / "starts").unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    except OSError as error:
        raise PlatformError(
            f"the batch script {path} cannot be written: {error.strerror}; choose another --save or mend this one"
        ) from error


def _submit(path: Path, chain: int) -> list[str]:
    """Submit the script; the job numbers. If a job of a chain is refused, those before it are cancelled."""
    numbers: list[str] = []
    for _ in range(chain):
        after = [f"--dependency=afterany:{numbers[-1]}"] if numbers else []
        try:
            answer = slurm_command("sbatch", "--parsable", *after, str(path))
        except PlatformError:
            if numbers:
                slurm_command("scancel", *numbers)
            raise
        numbers.append(answer.splitlines()[-1].split(";")[0])
    return numbers


def _after(job: Job, path: Path, numbers: list[str]) -> list[str]:
    """What to do now."""
    array = len(job.elements) > 1
    log = shlex.quote(str(path.parent)) + (f"/job_{numbers[0]}_*.log" if array else f"/job_{numbers[0]}.log")
    runs = f", {len(job.elements)} runs" if array else ""
    return [
        f"submitted {', '.join(numbers)}: {job.nodes} nodes x {job.ranks_per_node} ranks{runs}",
        f"script  {path}",
        f"watch   tail -F {log}",
        f"queue   squeue --job {','.join(numbers)}",
        f"curves  tensorboard --logdir {shlex.quote(str(job.folder))}",
        f"stop    scancel {' '.join(numbers)}   (the ranks save first)",
    ]


def _start(arguments: argparse.Namespace, job: Job) -> int:
    """Print the command of another launcher and become it: signals and exit code are its own."""
    hosts = Hosts(
        hostfile=arguments.hostfile,
        node_rank=arguments.node_rank,
        master_addr=arguments.master_addr,
        master_port=arguments.master_port,
    )
    mpi = _mpi() if arguments.launcher == "mpirun" and shutil.which("mpirun") else "openmpi"
    found = commands(arguments.launcher, job, hosts, mpi)
    if job.site.container_image:
        raise ConfigError("a container is started by --launcher slurm; start another launcher inside of it")
    if variables := [f"{name}={value}" for name, value in job.site.variables().items()]:
        found = [["env", *variables, *command] for command in found]
    for command in found:
        print(shlex.join(command), flush=True)
    if arguments.dry_run:
        return 0
    if len(found) > 1:
        raise ConfigError(f"run one of these on each of the {len(found)} nodes, or give --node-rank here")
    command = found[0]
    if shutil.which(command[0]) is None:
        raise PlatformError(f"{command[0]} is not on PATH; install it, or choose another --launcher")
    if arguments.launcher == "torchrun" and hosts.master_port and not hosts.node_rank and listens(hosts.master_port):
        # the ranks of the other launchers say so themselves; torchrun meets the port before them
        raise PlatformError(f"--master-port {hosts.master_port} is taken on this machine; give another")
    os.execvp(command[0], command)


def _mpi() -> str:
    return which_mpi(slurm_command("mpirun", "--version"))


def _positive(text: str) -> int:
    return int(Range(1)(text))


def _count(text: str) -> int:
    return int(Range(0)(text))
