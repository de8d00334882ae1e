"""A batch script into SLURM's queue, and which jobs of a run folder are there already."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from megalm.errors import PlatformError
from megalm.launching.cluster import slurm_command
from megalm.launching.job import Job
from megalm.launching.sbatch import sbatch_option
from megalm.storage.durable import replace_text

_RECORD = "submitted"
"""File of RUN/slurm: the number of each job that was submitted for the run."""
_ALIVE = "PENDING,RUNNING,SUSPENDED,CONFIGURING,COMPLETING"
"""States of a job that trains, will train, or still saves."""


def check_idle(job: Job) -> None:
    """No job for a run of this one is queued or runs, but those that this one is to wait for.

    Raises:
        PlatformError: there is one: two jobs would train into one folder.
    """
    waits = [value for name, value in map(sbatch_option, job.site.sbatch) if name == "dependency"]
    for element in job.elements:
        numbers = [number for number in _recorded(element.run) if not any(number in value for value in waits)]
        busy = _queued(numbers)
        if busy:
            raise PlatformError(
                f"{element.run} is the run of job {', '.join(busy)}, which is queued or runs; let it end, stop it "
                f"(scancel {' '.join(busy)}), let this one wait (--sbatch=--dependency=afterany:{':'.join(busy)}), or "
                "choose another --save"
            )


def submit(job: Job, path: Path, chain: int) -> list[str]:
    """Submit the script; the job numbers. If a job of a chain is refused, those before it are cancelled.

    Raises:
        PlatformError: SLURM refuses; the text is its own.
    """
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
    for element in job.elements:
        with contextlib.suppress(OSError):  # the jobs are queued: that this is not known to the next submit is no error
            kept = _recorded(element.run)[-100:]
            replace_text(element.run / "slurm" / _RECORD, "".join(f"{number}\n" for number in [*kept, *numbers]))
    return numbers


def _recorded(run: Path) -> list[str]:
    try:
        return [word for word in (run / "slurm" / _RECORD).read_text(encoding="utf-8").split() if word.isdigit()]
    except (OSError, UnicodeDecodeError):
        return []


def _queued(numbers: Sequence[str]) -> list[str]:
    """Those that SLURM has in its queue."""
    if not numbers:
        return []
    # of a single number that SLURM has forgotten it says that it is invalid, of several it shows what is left
    shown = slurm_command(
        "squeue", "--noheader", "--format=%F", f"--states={_ALIVE}", f"--jobs={','.join(['1', '2', *numbers])}"
    )
    return sorted(set(shown.split()) & set(numbers), key=int)
