"""The run folder (`--save`): made, probed, locked, or set aside."""

import contextlib
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megalm.checkpoint.format import LATEST
from megalm.checkpoint.fresh import FRESH, note_fresh
from megalm.config.output import CheckpointConfig
from megalm.distributed.collectives import gather_json, on_all_ranks
from megalm.distributed.context import RankContext
from megalm.errors import CheckpointError
from megalm.storage.durable import replace_text
from megalm.storage.faults import writing
from megalm.storage.lock import HeldError, hold

_ENTRIES = ("config.yaml", "metrics.jsonl", "tensorboard", "logs", LATEST, FRESH)
_SEEN_WITHIN_S = 10.0
"""What another node wrote may be seen late on a network file system."""


@contextlib.contextmanager
def open_run_folder(checkpoint: CheckpointConfig, context: RankContext, command: str = "") -> Iterator[Path | None]:
    """The run folder, made, probed and held for this job until the block ends; None without --save.

    With --fresh an earlier run's files are set aside, and `command` begins a new one. Every rank calls it.

    Raises:
        CheckpointError: it cannot be written, is not the same for all ranks, or another job holds it.
    """
    if checkpoint.save is None:
        yield None
        return
    folder, is_main = Path(checkpoint.save), context.rank == 0
    share_run_folder(folder, context)
    lock = on_all_ranks(context.device, lambda: lock_run_folder(folder) if is_main else None)
    with lock or contextlib.nullcontext():
        if checkpoint.fresh:
            on_all_ranks(context.device, lambda: _begin_anew(folder, command) if is_main else None)
        yield folder


def share_run_folder(run: Path, context: RankContext) -> None:
    """Make the run folder on rank 0, and prove that every rank sees that folder and can write there.

    Raises:
        CheckpointError: it cannot be made or written, or a rank sees another one.
    """
    is_main, device = context.rank == 0, context.device
    on_all_ranks(device, lambda: prepare_run_folder(run) if is_main else None)
    host, name = gather_json([socket.gethostname(), f".seen-{uuid.uuid4().hex}"], device)[0]
    mark = run / name
    try:
        on_all_ranks(device, lambda: mark.touch() if is_main else None)
        on_all_ranks(device, lambda: None if is_main else _see(mark, host), "looking for the run folder")
        on_all_ranks(device, lambda: None if is_main else prepare_run_folder(run))
    finally:
        if is_main:
            mark.unlink(missing_ok=True)


def _see(mark: Path, host: str) -> None:
    """Returns when this rank sees what rank 0 wrote."""
    deadline = time.monotonic() + _SEEN_WITHIN_S
    while not mark.exists():
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"--save {mark.parent} is not the same folder on {socket.gethostname()} as on {host}, where rank 0 is: "
                "each would keep its part of the checkpoints for itself; choose a folder that all nodes share"
            )
        time.sleep(0.05)


def _begin_anew(run: Path, command: str) -> None:
    set_aside(run)
    note_fresh(run, command)


def prepare_run_folder(run: Path) -> None:
    """Make the run folder and prove that it can be written, before any time is spent on training.

    Raises:
        CheckpointError: it cannot be made or written.
    """
    with _usable(run):
        run.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=run, prefix=".probe-") as probe:
            probe.write(bytes(4096))  # a full disk still takes an empty file
            probe.flush()
            os.fsync(probe.fileno())


def _usable(run: Path) -> contextlib.AbstractContextManager[None]:
    return writing(run, CheckpointError, "choose another folder for --save, or mend this one")


def lock_run_folder(run: Path) -> BinaryIO:
    """Hold the run folder for this job as long as the returned file is open; a dead job's hold is gone with it.

    Raises:
        CheckpointError: another job holds it.
    """
    try:
        with _usable(run):
            return hold(run / ".lock")
    except HeldError as holder:
        raise CheckpointError(
            f"--save {run} is in use by another job ({holder}); wait for it, end it, or choose another folder"
        ) from None


def set_aside(run: Path) -> Path | None:
    """Move an earlier run's files into `run/previous_N` (--fresh); None if there are none.

    Raises:
        CheckpointError: they cannot be moved.
    """
    with _usable(run):
        entries = [run / name for name in _ENTRIES if (run / name).exists()]
        entries += [path for path in run.glob("step_*") if path.is_dir()]
        if not entries:
            return None
        number = 1
        while (run / f"previous_{number}").exists():
            number += 1
        aside = run / f"previous_{number}"
        aside.mkdir()
        for path in entries:
            os.rename(path, aside / path.name)
        return aside


def write_config(run: Path, text: str) -> None:
    """Leave the merged configuration in the run folder.

    Raises:
        CheckpointError: it cannot be written.
    """
    with _usable(run):
        replace_text(run / "config.yaml", text)
