"""What takes long to make (a file, a folder) is made once, by one process, while the others that want it wait.

They wait on a file lock, which the system frees when its holder dies. What is made has a folder of its own and appears
under its name by a rename, so that a killed build leaves nothing that could be loaded.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megalm.storage.lock import sign, take

HELD = "another process has held {path} for {timeout_s:.0f} s"
"""What is said where somebody else holds the lock for too long."""


def build_once(
    target: Path,
    make: Callable[[Path, int], Path],
    *,
    timeout_s: float,
    error: type[Exception],
    held: str = HELD,
) -> None:
    """Returns when `target` is there: `make(folder, lock)` makes it in an empty folder and says where.

    A program that `make` starts may inherit the descriptor `lock`: if this process is killed, the next one then waits
    until that program is gone too. Where `make` raises an `error`, those who waited meanwhile raise it with the same
    text and do not try again; who comes later does.

    Raises:
        error: `make` failed, or another process held the lock for `timeout_s` (its text is `held`).
        OSError: the folder of `target` cannot be written.
    """
    if target.exists():
        return
    started = time.time()
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_suffix(".lock"), timeout_s, error, held) as lock:
        if not target.exists():
            _build(target, make, lock, started, error)


def _build(target: Path, make: Callable[[Path, int], Path], lock: int, started: float, error: type[Exception]) -> None:
    """Build, unless the process that held the lock before has just failed."""
    failure = target.with_suffix(".failed")
    if failure.is_file() and failure.stat().st_mtime > started:
        raise error(failure.read_text(encoding="utf-8"))
    for left in target.parent.glob(f"{target.stem}.*.build"):  # of a build that was killed
        shutil.rmtree(left, ignore_errors=True)
    # of its own for each build: a killed one's compilers may go on for a while, and write into theirs
    folder = Path(tempfile.mkdtemp(prefix=f"{target.stem}.", suffix=".build", dir=target.parent))
    try:
        os.replace(make(folder, lock), target)
    except error as reason:
        failure.write_text(str(reason), encoding="utf-8")
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    failure.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, timeout_s: float, error: type[Exception], held: str = HELD) -> Iterator[int]:
    """Hold the lock file `path`, made where it is missing, and yield its descriptor; a dead holder's lock is free.

    Raises:
        error: somebody else held it for `timeout_s`; `held` is the text, with {path} and {timeout_s}.
    """
    with path.open("a") as file:
        if not take(file, timeout_s):
            raise error(held.format(path=path, timeout_s=timeout_s))
        sign(file)
        yield file.fileno()
