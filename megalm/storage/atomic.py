"""Files that appear under their final name complete and durable, or not at all."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megalm.errors import DataError
from megalm.storage.durable import sync_folder

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
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        while True:
            stream = os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.close()
                raise DataError(
                    f"{partial} is being written by another process; wait for it, or write to another place"
                ) from None
            # A writer that has just finished renames the file that we opened: then it is no longer ours to empty.
            if _is_same_file(stream, partial):
                stream.truncate(0)
                return stream
            stream.close()
    except OSError as error:
        raise DataError(f"cannot write {partial}: {error.strerror}; choose a folder that can be written") from error


def _is_same_file(stream: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def flush_to_disk(stream: BinaryIO) -> None:
    """Returns when the content of `stream` survives a power cut."""
    stream.flush()
    os.fsync(stream.fileno())


def publish(path: Path) -> None:
    """Gives the temporary file of `path` its final name; the rename survives a power cut."""
    os.replace(partial_path(path), path)
    sync_folder(path.parent)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary stream whose content becomes `path` when the block ends, and vanishes when the block raises.

    Raises:
        DataError: another process is writing `path`, its folder cannot be written, or the disk is full.
    """
    stream = open_locked(path)
    try:
        yield stream
        flush_to_disk(stream)
        publish(path)
    except BaseException as error:
        partial_path(path).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DataError(f"cannot write {path}: {error}; nothing was published") from error
        raise
    finally:
        stream.close()
