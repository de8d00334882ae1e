"""What the operating system refuses, in words: the path, what was tried, why, and what to do. The only place that turns
an OSError, or what a library makes of one, into an error of megalm.
"""

import contextlib
import errno
import os
import pwd
import re
import resource
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from megalm.errors import MegalmError, PlatformError

E = TypeVar("E", bound=MegalmError)
AnyPath = str | os.PathLike[str]

_IN_WORDS = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")
"""How libraries written in Rust, and Python's own texts, name the system's error."""


@contextlib.contextmanager
def reading(path: AnyPath, kind: type[E], advice: str) -> Iterator[None]:
    """What the system refuses inside the block becomes a `kind`: PATH cannot be read, why, and `advice`."""
    with attempting("read", path, kind, advice):
        yield


@contextlib.contextmanager
def writing(path: AnyPath, kind: type[E], advice: str) -> Iterator[None]:
    """What the system refuses inside the block becomes a `kind`: PATH cannot be written, why, and `advice`."""
    with attempting("write", path, kind, advice):
        yield


@contextlib.contextmanager
def attempting(doing: str, path: AnyPath, kind: type[E], advice: str) -> Iterator[None]:
    """What the system refuses inside the block becomes a `kind`: cannot `doing` PATH, why, and `advice`."""
    try:
        yield
    except MegalmError:
        raise
    except Exception as error:
        if system_fault(error) is None:
            raise
        raise refused(doing, path, error, kind, advice) from error


def refused(doing: str, path: AnyPath, error: Exception, kind: type[E], advice: str) -> E:
    """The error of `kind` for what the system said; a path that it names and that begins with `path` is named."""
    fault = system_fault(error) or OSError(errno.EIO, str(error))
    where = fault.filename if isinstance(fault.filename, str) else ""
    below = where if where.startswith(os.fspath(path)) else os.fspath(path)
    return kind(f"cannot {doing} {below}: {reason_of(fault, below)}; {advice}")


def unforeseen(error: OSError) -> PlatformError | None:
    """The error for what the system refused where nobody expected it; None for what is no matter of files."""
    if error.errno not in _DETAILS:
        return None
    name = error.filename if isinstance(error.filename, str | os.PathLike) else ""
    what = f"cannot use {os.fspath(name)}" if name else "the system refused"
    return PlatformError(f"{what}: {reason_of(error, name or os.curdir)}; mend that, and start again")


def system_fault(error: BaseException | None) -> OSError | None:
    """The system's error that `error` is, was raised from, or (from a library) tells in words; None: it is another."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error
        if found := _IN_WORDS.search(str(error)):
            number = int(found[1] or found[2])
            return OSError(number, os.strerror(number))
        error = error.__cause__
    return None


def reason_of(error: OSError, path: AnyPath) -> str:
    """Why the system refused `path`: its own words, and what can be seen from here (free space, limits, owner)."""
    detail = ""
    with contextlib.suppress(OSError, ValueError):
        detail = _DETAILS.get(error.errno or 0, _nothing)(Path(os.path.abspath(path)))
    said = os.strerror(error.errno) if error.errno else str(error)
    return f"{said} ({detail})" if detail else said


def files_beside(path: AnyPath) -> list[str]:
    """The files in the folder of one that is not there, as far as they can be seen: one of them may be meant."""
    try:
        if os.path.lexists(path):
            return []
        folder = os.path.dirname(path)
        return sorted(os.path.join(folder, entry.name) for entry in os.scandir(folder or os.curdir) if entry.is_file())
    except OSError:
        return []


def _nothing(path: Path) -> str:
    return ""


def _says(text: str) -> Callable[[Path], str]:
    return lambda path: text


def _free_space(path: Path) -> str:
    folder = _nearest_folder(path)
    found = os.statvfs(folder)
    if found.f_files and not found.f_favail:
        return f"{folder} has no inode left: it holds too many files"
    return f"{found.f_bavail * found.f_frsize / 1e6:.1f} MB are free in {folder}"


def _file_limit(path: Path) -> str:
    limit = file_size_limit()
    return "the file system takes no larger file" if limit is None else f"ulimit -f allows {limit / 1e6:.1f} MB a file"


def file_size_limit() -> int | None:
    """Bytes that a file of this process may have (`ulimit -f`); None: as many as it likes."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _open_files(path: Path) -> str:
    return f"ulimit -n allows {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} open files"


def _owner_and_mode(path: Path) -> str:
    """Of what closes the way: the first folder that this process may not enter, else the file, else its folder."""
    above = reversed(path.parents)
    closed = next((folder for folder in above if not os.access(folder, os.X_OK, effective_ids=True)), None)
    blocking = closed or (path if os.path.lexists(path) else _nearest_folder(path))
    found = os.lstat(blocking)
    return (
        f"{blocking} belongs to {_user(found.st_uid)} with mode {stat.filemode(found.st_mode)}, this process runs as "
        f"{_user(os.geteuid())}"
    )


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def _not_permitted(path: Path) -> str:
    return f"{_owner_and_mode(path)}; it may be marked immutable, see lsattr"


def _missing(path: Path) -> str:
    if path.is_symlink():
        return f"it is a link to {os.readlink(path)}, which does not exist"
    return "" if path.parent.is_dir() else f"there is no folder {_first(path, lambda above: not above.exists())}"


def _no_folder(path: Path) -> str:
    return f"{_first(path, lambda above: above.exists() and not above.is_dir())} is no folder"


def _first(path: Path, wanted: Callable[[Path], bool]) -> Path:
    return next(filter(wanted, reversed(path.parents)), path)


def _link(path: Path) -> str:
    return "it is a symbolic link, which is not followed here" if path.is_symlink() else ""


def _nearest_folder(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


_DETAILS: dict[int, Callable[[Path], str]] = {
    errno.ENOSPC: _free_space,
    errno.EDQUOT: _says("your quota there is used up, see quota -s"),
    errno.EFBIG: _file_limit,
    errno.EACCES: _owner_and_mode,
    errno.EPERM: _not_permitted,
    errno.EROFS: _says("it is mounted so that nobody can write"),
    errno.ENOENT: _missing,
    errno.ENOTDIR: _no_folder,
    errno.EISDIR: _says("a file is wanted"),
    errno.EEXIST: _nothing,
    errno.ENOTEMPTY: _nothing,
    errno.EXDEV: _nothing,
    errno.EBUSY: _nothing,
    errno.ETXTBSY: _nothing,
    errno.ELOOP: _link,
    errno.ENAMETOOLONG: _says("a name may have 255 bytes, a path 4095"),
    errno.EMFILE: _open_files,
    errno.ENFILE: _says("all processes of this machine together have too many files open"),
    errno.EIO: _says("the disk or the file server fails, see dmesg"),
    errno.ESTALE: _says("the file server has lost it: list its folder, or mount it again"),
    errno.EREMOTEIO: _says("the file server fails"),
    errno.ENODEV: _nothing,
    errno.ENXIO: _nothing,
    errno.EINVAL: _nothing,
    errno.ENOLCK: _says("the file system has no lock left"),
    errno.EOPNOTSUPP: _nothing,
    errno.ENOMEM: _nothing,
    errno.EMLINK: _nothing,
}
"""What can be said beyond the system's own words, for all errors that are a matter of files."""
