"""Files that appear under their final name complete and durable, or not at all."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megalm.errors import DataError
from megalm.storage.durable import open_kept, open_new, sync_folder
from megalm.storage.faults import writing
from megalm.storage.lock import is_still, take

PARTIAL_SUFFIX = ".partial"


def partial_path(path: Path) -> Path:
    """Where `path` is written before it is complete: the same folder, so that a rename suffices."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def open_locked(path: Path) -> BinaryIO:
    """The empty temporary file of `path`, opened for writing and locked against a second writer.

    What a killed writer left is emptied and reused: its lock went with its process.

    Raises:
        DataError: another process is writing `path`, or its folder cannot be written.
    """
    partial = partial_path(path)
    with writing(partial, DataError, "choose a folder that can be written"):
        partial.parent.mkdir(parents=True, exist_ok=True)
        while True:
            stream = open_kept(partial)
            if not take(stream):
                stream.close()
                raise DataError(
                    f"{partial} is being written by another process; wait for it, or write to another place"
                )
            # A writer that has just finished renames the file that we opened: then it is no longer ours to empty.
            if is_still(stream, partial):
                stream.truncate(0)
                return stream
            stream.close()


def flush_to_disk(stream: BinaryIO) -> None:
    """Returns when the content of `stream` survives a power cut."""
    stream.flush()
    os.fsync(stream.fileno())


def publish(path: Path) -> None:
    """Gives the temporary file of `path` its final name; the rename survives a power cut."""
    os.replace(partial_path(path), path)
    sync_folder(path.parent)


@contextlib.contextmanager
def atomic_write_by_any(path: Path) -> Iterator[BinaryIO]:
    """As `atomic_write`, for files that several processes and nodes may write at once, all with the same content.

    The temporary file's name is its writer's own, so that they do not meet.

    Raises:
        OSError: the folder of `path` cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open_new(temporary) as stream:
            yield stream
            flush_to_disk(stream)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary stream whose content becomes `path` when the block ends, and vanishes when the block raises.

    Raises:
        DataError: another process is writing `path`, its folder cannot be written, or the disk is full.
    """
    stream = open_locked(path)
    try:
        with writing(path, DataError, "nothing was published"):
            yield stream
            flush_to_disk(stream)
            publish(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial_path(path).unlink()
        raise
    finally:
        with contextlib.suppress(OSError):  # what a full disk still has in the buffer is not wanted any more
            stream.close()


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that becomes it, durably, when the block ends, and vanishes when the block raises.

    Raises:
        OSError: it cannot be made or renamed.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
