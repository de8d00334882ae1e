"""The folder of parts, P.parts: what is finished of a run that is not, for one process at a time."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megalm.data.indexed.manifest import manifest_path, read_manifest
from megalm.data.indexed.writer import existing_files
from megalm.data.preprocess.options import PreprocessOptions
from megalm.errors import DataError
from megalm.storage.durable import open_kept
from megalm.storage.faults import writing
from megalm.storage.lock import is_still, take_alone


def is_complete(options: PreprocessOptions, fingerprint: str) -> bool:
    """Whether the datasets are there already, made of the same input in the same way."""
    for prefix in options.prefixes:
        try:
            manifest = read_manifest(manifest_path(prefix)) or {}
        except DataError:
            return False
        sizes = [(f"{prefix}.{kind}", (manifest.get(kind) or {}).get("bytes")) for kind in ("bin", "idx")]
        if not fingerprint or manifest.get("fingerprint") != fingerprint:
            return False
        if any(not os.path.isfile(path) or os.path.getsize(path) != size for path, size in sizes):
            return False
    return True


def publishing_marker(parts: Path) -> Path:
    """The file that names the run whose datasets are getting their final names."""
    return parts / "publishing"


def check_output(options: PreprocessOptions, fingerprint: str) -> None:
    """Checks that no dataset is there, but for what this very run has published before it was killed.

    Raises:
        DataError: one is, and it is not to be replaced.
    """
    marker = publishing_marker(options.parts)
    if fingerprint and marker.is_file() and marker.read_text() == fingerprint:
        return
    existing = [name for prefix in options.prefixes for name in existing_files(prefix)]
    if existing and not options.overwrite:
        raise DataError(f"{' and '.join(existing)} exist already; give --overwrite, or another prefix")
    marker.unlink(missing_ok=True)


@contextlib.contextmanager
def locked_parts(options: PreprocessOptions) -> Iterator[None]:
    """The folder of parts, for this process alone; removed at the end when it is of no more use.

    Raises:
        DataError: another run has it, or it cannot be made.
    """
    parts = options.parts
    with writing(parts, DataError, "choose a folder that can be written"):
        parts.mkdir(parents=True, exist_ok=True)
        lock = open_kept(parts / "lock")  # closed below, after the folder is gone
    with lock:
        # a run that has just finished has removed the file that was opened: then there is nothing to lock
        if not take_alone(lock) or not is_still(lock, parts / "lock"):
            raise DataError(f"{parts} is being written by another process; wait for it, or write to another place")
        try:
            for left in parts.glob("*.partial"):
                left.unlink()
            yield
        except BaseException:
            shutil.rmtree(parts / "assembly", ignore_errors=True)
            if not any(parts.glob("*.shard")):
                shutil.rmtree(parts, ignore_errors=True)
            raise
        shutil.rmtree(parts, ignore_errors=True)
