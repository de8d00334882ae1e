"""The checkpoints of a run folder: how old, how large, how good, and what is wrong with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm.checkpoint.format import MANIFEST, Manifest, name_of_latest, step_folder, steps_of
from megalm.checkpoint.reader import problems_of
from megalm.checkpoint.retention import Retention
from megalm.errors import CheckpointError
from megalm.monitor.sinks.jsonl import read_metrics
from megalm.storage.faults import reading

BEST_BY = "validation_loss"
"""The metric by which a run keeps its best checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One checkpoint of a run."""

    step: int
    folder: Path
    written: float
    """When, in seconds since the epoch."""
    bytes: int
    """Of its files."""
    manifest: Manifest | None
    """None: the manifest itself is damaged."""
    problems: tuple[str, ...]
    """What is wrong with it, as far as was looked."""
    is_latest: bool
    """`latest` names it: the run goes on from here."""
    metric: float | None
    """The value, at its step, of the metric that was asked for."""


def entries_of(run: Path, *, hashes: bool = False, metric: str = BEST_BY) -> list[Entry]:
    """The checkpoints of a run folder, oldest first; with `hashes` every byte of them is read.

    Raises:
        CheckpointError: there is no such folder, or the system does not let it be read.
    """
    with reading(run, CheckpointError, "give this process the right to read it, or another folder"):
        if not run.is_dir():
            raise CheckpointError(f"{run} is no folder; give a run folder (--save of the training)")
        latest, values = name_of_latest(run), values_of(run, metric)
        return [_entry(step_folder(run, step), step, latest, values.get(step), hashes=hashes) for step in steps_of(run)]


def _entry(folder: Path, step: int, latest: str | None, metric: float | None, *, hashes: bool) -> Entry:
    manifest, problems = looked_at(folder, hashes=hashes)
    return Entry(
        step=step,
        folder=folder,
        written=(folder / MANIFEST).stat().st_mtime,
        bytes=sum(path.lstat().st_size for path in folder.iterdir()),
        manifest=manifest,
        problems=tuple(problems),
        is_latest=folder.name == latest,
        metric=metric,
    )


def looked_at(folder: Path, *, hashes: bool) -> tuple[Manifest | None, list[str]]:
    """The manifest of a checkpoint and what is wrong with it: names and sizes of its files, or with `hashes` each byte.

    Raises:
        CheckpointError: the system does not let its files be read.
    """
    try:
        manifest = Manifest.read(folder)
    except CheckpointError as error:
        return None, [str(error)]
    return manifest, problems_of(folder, manifest, verify=hashes)


def values_of(run: Path, metric: str) -> dict[int, float]:
    """The last value of a metric at each step, from metrics.jsonl; none where there is no such file."""
    path = run / "metrics.jsonl"
    rows = read_metrics(path) if path.is_file() else []
    return {row["step"]: float(row[metric]) for row in rows if isinstance(row.get(metric), int | float)}


def removable(entries: Sequence[Entry], retention: Retention) -> list[Entry]:
    """What no rule wants: valid checkpoints, and damaged ones that lie before the newest valid one.

    The one that `latest` names stays, and so do those after it: the run has turned back from them, for a reason that a
    person is to look at.
    """
    good = [entry.step for entry in entries if not entry.problems]
    if not good:
        return []
    values = {entry.step: entry.metric for entry in entries if entry.metric is not None}
    kept = retention.kept(good, values)
    end = next((entry.step for entry in entries if entry.is_latest), good[-1])
    return [entry for entry in entries if entry.step not in kept and entry.step < min(end, good[-1])]
