"""What is to run where: the facts from which batch scripts and command lines are written."""

import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from megalm.errors import ConfigError
from megalm.launching.site import Site

IDLE_STARTS = 3
"""Starts in a row without a new checkpoint after which a job is not started again."""
EXIT_NO_PROGRESS = 93
"""Exit code of a job that started again and again without a new checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Element:
    """One run of a job array: its folder and the flags that set it apart."""

    run: Path
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training command and the nodes that it asks for."""

    script: str
    """A file, or a module's name."""
    flags: tuple[str, ...]
    """Of the training command, without --save and --fresh."""
    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    """To ask SLURM for; 0 on CPU nodes."""
    gpu_type: str | None = None
    """Of which type, as SLURM names it; None: any."""
    folder: Path
    """Where the batch script and its logs go, under slurm/: the run folder, or the one above the runs of an array."""
    elements: tuple[Element, ...]
    directory: Path
    site: Site
    time: str | None = None
    name: str = "megalm"
    signal_before_s: int = 300
    requeue: bool = True
    idle_starts: int = IDLE_STARTS
    chained: bool = False
    fresh: bool = False
    array_limit: int | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    """Memory of each node, as SLURM writes it; 0 is all."""
    environment: dict[str, str] = field(default_factory=dict)
    is_module: bool = False
    """What `script` is."""
    command: str = ""
    """The command that describes this job, for the script's first lines."""

    @property
    def gpus_asked(self) -> str:
        """The GPUs of each node as SLURM's --gpus-per-node takes them; empty: none."""
        kind = f"{self.gpu_type}:" if self.gpu_type else ""
        return f"{kind}{self.gpus_per_node}" if self.gpus_per_node else ""

    @property
    def ranks(self) -> int:
        """Ranks of one run."""
        return self.nodes * self.ranks_per_node

    @property
    def python(self) -> str:
        """The interpreter: this one, or the container's."""
        return "python" if self.site.container_image else sys.executable

    def training_script(self, module_flag: str = "-m") -> list[str]:
        """The words that name what is run; `module_flag` is the launcher's word before a module."""
        return [module_flag, self.script] if self.is_module else [self.script]

    def training_command(self, element: Element, module_flag: str = "-m") -> list[str]:
        """The training command of one run as it is typed without a launcher."""
        fresh = ["--fresh"] if self.fresh else []
        save = ["--save", str(element.run)] if element.run != Path() else []
        return [*self.training_script(module_flag), *self.flags, *element.flags, *save, *fresh]


def program(name: str) -> str:
    """A program of this Python environment: its bare name if that is what the shell finds, else its path."""
    beside = Path(sys.executable).parent / name
    found = shutil.which(name)
    if found is not None and (not beside.exists() or Path(found).resolve() == beside.resolve()):
        return name
    return str(beside) if beside.exists() else name


def time_seconds(text: str) -> int:
    """Seconds of a time limit as SLURM writes it: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        ConfigError: it is none of these.
    """
    match = re.fullmatch(r"(?:(\d+)-(\d+)(?::(\d+)(?::(\d+))?)?)|(?:(\d+)(?::(\d+)(?::(\d+))?)?)", text)
    if match is None:
        raise ConfigError(f"--time {text} is no time limit; write minutes, HH:MM:SS or DAYS-HH:MM:SS")
    days, day_hours, day_minutes, day_seconds, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] is not None:
        return ((days * 24 + day_hours) * 60 + day_minutes) * 60 + day_seconds
    return (first * 60 + second) * 60 + third if match[7] is not None else first * 60 + second
