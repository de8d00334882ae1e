"""Commands as a user types them, and what tests ask about processes."""

import contextlib
import importlib.util
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import megalm
from megalm.distributed.environment import environment_with

REPOSITORY = Path(megalm.__file__).parents[1]
BIN = Path(sys.executable).parent
_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
_MAKE = ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS")
"""What `make test` hands to every process below it: a make that a test starts would take it for its own."""
_SCHEDULERS = ("SLURM_", "OMPI_", "PMI", "PMIX", "TORCHELASTIC", "MEGALM_")


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    output: str
    """Standard output and errors as one stream."""

    @property
    def errors(self) -> list[str]:
        """The error messages that megalm printed."""
        return re.findall(r"^error[^:\n]*: .*", self.output, flags=re.MULTILINE)


def environment() -> dict[str, str]:
    """This environment with the virtual environment's programs first and no trace of another launch."""
    return {name: value for name, value in environment_with(f"{BIN}:").items() if name not in (*_LAUNCH, *_MAKE)}


def quiet_environment() -> dict[str, str]:
    """`environment()` without traces of a scheduler either; one thread a rank."""
    kept = {name: value for name, value in environment().items() if not name.startswith(_SCHEDULERS)}
    return kept | {"OMP_NUM_THREADS": "1"}


def run(
    *command: str | Path, timeout: float = 240, cwd: Path = REPOSITORY, environ: dict[str, str] | None = None
) -> Finished:
    """Run a command to its end; it and all that it started are killed when the time is over.

    Raises:
        AssertionError: it did not end within `timeout` seconds.
    """
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env=environment() if environ is None else environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_group(process.pid)
        output, _ = process.communicate()
        raise AssertionError(f"{command} did not end within {timeout} s:\n{output}") from None
    return Finished(process.returncode, output)


def kill_group(leader: int) -> None:
    """Kill all processes of a group."""
    os.killpg(leader, signal.SIGKILL)


def free_port() -> int:
    """A port that nobody listens on, and that no connection is given before it is used (those start at 32768)."""
    while True:
        port = secrets.choice(range(20_000, 32_000))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def copy_repository(folder: Path) -> None:
    """Copy the repository's files as git sees them into `folder`, and what Python has compiled of them."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in listed.splitlines():
        for copied in (name, importlib.util.cache_from_source(name)) if name.endswith(".py") else (name,):
            if (REPOSITORY / copied).is_file():
                (folder / copied).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(REPOSITORY / copied, folder / copied)
