"""Files that survive a power cut (fsync, atomic replacement), follow no planted link, and their hashes."""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import BinaryIO, cast


def sync_folder(folder: Path) -> None:
    """Returns when the names in `folder` are on disk."""
    _sync(folder)


def sync_file(path: Path) -> None:
    """Returns when the content of `path` is on disk."""
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_new(path: Path, mode: int = 0o666) -> BinaryIO:
    """A new file `path`, opened for writing and reading; what lay there, such as a killed writer's, is removed.

    A link that lies there is removed and not followed. The umask takes its part of `mode`.
    """
    path.unlink(missing_ok=True)
    return _opened(path, "w+b", os.O_CREAT | os.O_EXCL, mode)


def open_kept(path: Path) -> BinaryIO:
    """The file `path`, opened for writing and reading, made where it is missing; its content stays.

    Raises:
        OSError: as always, and where a link lies there, which is not followed.
    """
    return _opened(path, "r+b", os.O_CREAT, 0o666)


def _opened(path: Path, mode: str, flags: int, permissions: int) -> BinaryIO:
    """No link is followed; the stream has the path as its name, which messages about it say."""
    flags |= os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    return cast(BinaryIO, open(path, mode, opener=lambda name, _: os.open(name, flags, permissions)))


def replace_text(path: Path, text: str, mode: int = 0o666) -> None:
    """`path` holds its old content or `text`, whatever happens, and `text` durably after the return."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open_new(temporary, mode) as stream:
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return hashlib.file_digest(stream, "sha256").hexdigest()
