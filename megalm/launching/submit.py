"""`megalm submit`: a training command as a SLURM job, or by another launcher. All is checked first."""

import argparse
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megalm.config.merging.flags import as_flags, build_parser
from megalm.config.merging.load import load
from megalm.config.merging.names import RENAMED
from megalm.config.merging.settings import SETTINGS
from megalm.config.merging.suggest import did_you_mean
from megalm.config.paths import read_path, variables_of
from megalm.config.sections import RunConfig
from megalm.distributed.environment import captured_environment, environment_without, left_behind, user_variable
from megalm.distributed.network import listens
from megalm.errors import ConfigError, PlatformError
from megalm.launching.cluster import check_request, slurm_command, with_defaults
from megalm.launching.commands import Hosts, commands, which_mpi
from megalm.launching.job import Element, Job, time_seconds
from megalm.launching.options import MODULE, SITE_OPTIONS, add_arguments, check_launcher
from megalm.launching.queue import check_idle, submit
from megalm.launching.sbatch import check_sbatch, sbatch_hint
from megalm.launching.script import batch_script
from megalm.launching.site import Site, read_site
from megalm.secrets import masked
from megalm.storage.durable import replace_text
from megalm.storage.faults import attempting

__all__ = ["add_arguments", "run"]

TAKES_RUN_FLAGS = True
"""What this command does not know itself it hands to the training script."""


def run(arguments: argparse.Namespace, run_flags: list[str]) -> int:
    """Check, then print, submit or start.

    Raises:
        ConfigError: the run, its layout or the request cannot be.
        PlatformError: SLURM or another launcher is missing or refuses.
    """
    check_launcher(arguments)
    job = describe(arguments, run_flags)
    if arguments.launcher != "slurm":
        return _start(arguments, job)
    job = _fitted(job, arguments.dry_run)
    path = job.folder / "slurm" / "job.sbatch"
    text = batch_script(job, str(path))
    for note in _not_in_the_script(job):
        print(f"note: {note}", file=sys.stderr)
    if arguments.dry_run:
        print(text, end="")
        return 0
    check_idle(job)
    _write(job, path, text)
    numbers = submit(job, path, arguments.chain)
    print("\n".join(_after(job, path, numbers)))
    return 0


def _not_in_the_script(job: Job) -> list[str]:
    """What the shell has that does not count in the job, each said once."""
    notes = []
    if ignored := environment_without("SBATCH_")[1]:
        notes.append(
            f"{', '.join(ignored)} of this shell {'does' if len(ignored) == 1 else 'do'} not count, the script does; "
            "give --partition, --time, ... or --sbatch=--OPTION"
        )
    left = left_behind([*job.environment, *job.site.variables()])
    if left:
        more = f" and {len(left) - 16} more" if len(left) > 16 else ""
        notes.append(
            f"the job does not get {', '.join(left[:16])}{more} of this shell; put what it needs under environment: of "
            "a site file, a secret into a file that its setup: sources"
        )
    return notes


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
        print(f"note: not compared with a cluster, whose nodes say cores and memory: {error}", file=sys.stderr)
        return job
    if job.gpus_per_node and not partition.gpus:
        print("note: the partition declares no GPUs to SLURM, so none are asked for", file=sys.stderr)
        job = replace(job, gpus_per_node=0)
    return with_defaults(job, partition)


def describe(arguments: argparse.Namespace, run_flags: list[str]) -> Job:
    """The job of a command line, checked as far as that is possible without a cluster.

    Raises:
        ConfigError: what is wrong with it.
    """
    if arguments.ntasks_per_node is None:
        arguments.ntasks_per_node = arguments.gpus_per_node.count or 1
    is_module = not Path(arguments.script).is_file()
    if is_module and not _is_importable(arguments.script):
        raise ConfigError(f"--script {arguments.script} does not exist; name a training script, or a module: {MODULE}")
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
    site = _site(arguments)
    check_sbatch(site.sbatch)
    return Job(
        script=arguments.script,
        flags=tuple(flags),
        nodes=arguments.nodes,
        ranks_per_node=arguments.ntasks_per_node,
        gpus_per_node=arguments.gpus_per_node.count,
        gpu_type=arguments.gpus_per_node.kind,
        folder=folder,
        elements=elements,
        directory=Path.cwd(),
        site=site,
        time=arguments.time,
        name=arguments.job_name or folder.name or "megalm",
        signal_before_s=_signal_before(arguments),
        requeue=not arguments.no_requeue and arguments.chain == 1,
        idle_starts=arguments.max_idle_starts,
        chained=arguments.chain > 1,
        fresh=config.checkpoint.fresh,
        array_limit=arguments.array_limit,
        cpus_per_task=arguments.cpus_per_task,
        mem=site.mem,
        environment=captured_environment(also=_named_variables(flags, arguments.config)),
        is_module=is_module,
        command=masked(shlex.join(["megalm", *(word for word in arguments.words if word != "--dry-run")])),
    )


def _named_variables(flags: Sequence[str], recipes: Sequence[str]) -> list[str]:
    """The variables in the paths of flags and recipes, which the ranks read again."""
    texts = [Path(recipe).read_text(encoding="utf-8") for recipe in recipes]
    return [name for text in [*flags, *texts] for name in variables_of(text)]


def _is_importable(name: str) -> bool:
    """Whether this is a module's name; imports the packages above it."""
    try:
        return all(map(str.isidentifier, name.split("."))) and importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def _site(arguments: argparse.Namespace) -> Site:
    given = {name: getattr(arguments, name) for name in SITE_OPTIONS}
    if arguments.site is not None or (path := user_variable("MEGALM_SITE")) is None:
        return read_site(arguments.site, given)
    try:
        return read_site(read_path(path), given, named_by="MEGALM_SITE=")
    except ValueError as error:
        raise ConfigError(f"MEGALM_SITE={path} {error}") from None


def _training_flags(arguments: argparse.Namespace, run_flags: list[str]) -> list[str]:
    """The training script's flags.

    Raises:
        ConfigError: a word that is neither an option of submit nor a flag of training, but close to an option.
    """
    rest = [word for word in run_flags if word != "--"]
    own = [name.replace("_", "-") for name in vars(arguments)]
    known = {option[2:] for option in build_parser()._option_string_actions if option.startswith("--")}
    problems = []
    for word, following in zip(rest, [*rest, "--"][1:], strict=True):
        name = word[2:].partition("=")[0].replace("_", "-")
        if not word.startswith("-") or name in known or re.match(r"-[\d.]", word):
            continue
        if hint := sbatch_hint(word if following.startswith("-") else f"{word} {following}"):
            problems.append(hint)
        elif word.startswith("--") and (hint := did_you_mean(name, own, "--")):
            problems.append(f"unknown option --{name}{hint}")
    if problems:
        raise ConfigError(problems)
    recipes = [word for recipe in arguments.config for word in ("--config", recipe)]
    return recipes + rest


def _elements(arguments: argparse.Namespace, flags: list[str]) -> tuple[tuple[Element, ...], RunConfig]:
    """The runs of the job, each checked with its layout; `flags` loses --save and --fresh."""
    config = _checked(flags, arguments, tell=True)
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
        chosen = tuple(word for name, value in pairs for word in as_flags(name, value))
        run = folder / ",".join(f"{name}={value}" for name, value in pairs).replace("/", "_")
        _checked([*flags, *chosen, "--save", str(run)], arguments)
        if run in (element.run for element in elements):
            raise ConfigError(f"two runs of the sweep would share the folder {run}; sweep over other values")
        elements.append(Element(run=run, flags=chosen))
    return tuple(elements), config


def _checked(flags: Sequence[str], arguments: argparse.Namespace, *, tell: bool = False) -> RunConfig:
    loaded = load(flags, Path(arguments.script).name)
    config = loaded.on_ranks(arguments.nodes * arguments.ntasks_per_node)
    for note in loaded.notes if tell else ():
        print(f"note: {note}", file=sys.stderr)
    return config


def _axis(text: str) -> tuple[str, list[str]]:
    name, _, values = text.partition("=")
    name, found = name.removeprefix("--").replace("_", "-"), [value for value in values.split(",") if value]
    if not name or not found or len({_meaning(name, value) for value in found}) < len(found):
        raise ConfigError(f"--sweep {text} must be a flag and different values for it: --sweep lr=1e-3,3e-4")
    return name, found


def _meaning(name: str, value: str) -> str:
    """What a value says, however it is written: 1e-3 and 0.001 are one; a value that does not fit stays as it is."""
    setting = SETTINGS.get(RENAMED.get(name, name.replace("-", "_")))
    try:
        return value if setting is None else repr(setting.convert(value))
    except ValueError:
        return value


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
    with attempting("write the batch script", path, PlatformError, "choose another --save or mend this one"):
        for element in job.elements:
            (element.run / "slurm").mkdir(parents=True, exist_ok=True)
            (element.run / "slurm" / "starts").unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text, mode=0o600)  # it holds the environment of the submission


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
        hostfile=arguments.hostfile and Path(arguments.hostfile),
        node_rank=arguments.node_rank,
        master_addr=arguments.master_addr,
        master_port=arguments.master_port,
    )
    mpi = _mpi() if arguments.launcher == "mpirun" and shutil.which("mpirun") else "openmpi"
    found = commands(arguments.launcher, job, hosts, mpi)
    if job.site.container_image:
        raise ConfigError("a container is started by --launcher slurm; start another launcher inside of it")
    if job.site.setup:
        print("note: setup: of the site runs in batch scripts only; run its lines in this shell first", file=sys.stderr)
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
