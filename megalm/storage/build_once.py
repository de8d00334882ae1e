"""What takes long to make (a file, a folder) is made once, by one process, while the others that want it wait.

They wait on a file lock, which the system frees when its holder dies. What is made has a folder of its own and appears
under its name by a rename, so that a killed build leaves nothing that could be loaded. The SHA-256 of a file lies
beside it: one that a disk or a crash has damaged is made again. What others can write is not used: it may be code.
"""

import grp
import os
import pwd
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megalm.storage.durable import open_kept, replace_text, sha256_of, sync_file, sync_folder
from megalm.storage.lock import sign, take

HELD = "another process has held {path} for {timeout_s:.0f} s"
"""What is said where somebody else holds the lock for too long."""


def build_once(
    target: Path,
    make: Callable[[Path], Path],
    *,
    timeout_s: float,
    error: type[Exception],
    held: str = HELD,
) -> None:
    """Returns when `target` is there and whole: `make(folder)` makes it in an empty folder and says where.

    Where `make` raises an `error`, those who waited meanwhile raise it with the same text and do not try again; who
    comes later does.

    Raises:
        error: `make` failed, another process held the lock for `timeout_s` (its text is `held`), or others than this
            user can write the folder of `target`.
        OSError: the folder of `target` cannot be written.
    """
    started = time.time()
    target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    _require_own(target.parent, error)
    if _is_sound(target):
        return
    with locked(target.with_suffix(".lock"), timeout_s, error, held):
        if not _is_sound(target):
            _build(target, make, started, error)


def _require_own(folder: Path, error: type[Exception]) -> None:
    """Checks that nobody but this user, or root, can have put something into a folder from which code is loaded."""
    found = os.stat(folder)
    if found.st_uid not in (os.geteuid(), 0):
        raise error(f"{folder} belongs to another user (number {found.st_uid}), who could plant code there")
    open_to = found.st_mode & (stat.S_IWOTH if _is_own_group(found.st_gid) else stat.S_IWOTH | stat.S_IWGRP)
    if open_to:
        raise error(
            f"others can write {folder} (mode {stat.filemode(found.st_mode)}) and could plant code there; empty it "
            "and chmod go-w"
        )


def _is_own_group(number: int) -> bool:
    """Whether this is the group that a user has for himself, as distributions with umask 002 give him."""
    try:
        own, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(number)
    except KeyError:
        return False
    return own.pw_gid == number and group.gr_name == own.pw_name and set(group.gr_mem) <= {own.pw_name}


def _is_sound(target: Path) -> bool:
    """Whether it is there, as it was made; of a folder only that it is there."""
    if target.is_dir():
        return True
    try:
        return _digest_path(target).read_text(encoding="ascii").strip() == sha256_of(target)
    except (OSError, UnicodeDecodeError):
        return False


def _digest_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.sha256")


def _build(target: Path, make: Callable[[Path], Path], started: float, error: type[Exception]) -> None:
    """Build, unless the process that held the lock before has just failed."""
    failure = target.with_suffix(".failed")
    if failure.is_file() and failure.stat().st_mtime > started:
        raise error(failure.read_text(encoding="utf-8", errors="replace"))
    for left in target.parent.glob(f"{target.stem}.*.build"):  # of a build that was killed
        shutil.rmtree(left, ignore_errors=True)
    # of its own for each build: a killed one's compilers may go on for a while, and write into theirs
    folder = Path(tempfile.mkdtemp(prefix=f"{target.stem}.", suffix=".build", dir=target.parent))
    try:
        made = make(folder)
        if made.is_file():
            sync_file(made)
            replace_text(_digest_path(target), sha256_of(made) + "\n")
        os.replace(made, target)
        sync_folder(target.parent)
    except error as reason:
        replace_text(failure, str(reason))
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    failure.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, timeout_s: float, error: type[Exception], held: str = HELD) -> Iterator[None]:
    """Hold the lock file `path`, made where it is missing; a dead holder's lock is free.

    Raises:
        error: somebody else held it for `timeout_s`; `held` is the text, with {path} and {timeout_s}.
    """
    with open_kept(path) as file:
        if not take(file, timeout_s):
            raise error(held.format(path=path, timeout_s=timeout_s))
        sign(file)
        yield
