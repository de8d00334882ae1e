"""Locks on open files, which the system frees when their holder dies, however it dies."""

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO, Any, BinaryIO

from megalm.storage.durable import open_kept
from megalm.waiting import Patience

_RETRY_S = 0.1


class HeldError(Exception):
    """Somebody else holds a lock; its text says who."""


def take(stream: IO[Any], wait_s: float = 0.0) -> bool:
    """Lock an open file, for this process and those that inherit it; False: another held it for `wait_s`.

    `math.inf` waits until it is free.

    Raises:
        OSError: a file system without locks.
    """
    patience = Patience()
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if patience.waited_s >= wait_s:
                return False
        if patience.is_over():
            patience.say(f"another process holds {stream.name}{_holder(stream)}, and builds what this one needs")
        time.sleep(_RETRY_S)


def sign(stream: IO[Any]) -> None:
    """Write into a locked file who holds it."""
    os.ftruncate(stream.fileno(), 0)
    os.pwrite(stream.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _holder(stream: IO[Any]) -> str:
    """Who holds the lock, as it wrote by `sign`, for a message."""
    try:
        return f" ({Path(stream.name).read_text(encoding='utf-8', errors='replace').strip()[:200]})"
    except OSError:
        return ""


def take_alone(stream: IO[Any]) -> bool:
    """Lock an open file for this process only: its forked workers do not hold the lock on when it is killed.

    False: another process holds it.
    """
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def hold(path: Path) -> BinaryIO:
    """Lock the file `path`, made where it is missing, as long as the returned file is open; it says who holds it.

    Raises:
        HeldError: another process holds it; the text is what that one wrote.
    """
    stream = open_kept(path)
    if not take(stream):
        holder = stream.read().decode(errors="replace").strip()
        stream.close()
        raise HeldError(holder)
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    stream.flush()
    return stream


def is_still(stream: IO[Any], path: Path) -> bool:
    """Whether the open file is the one of this name: who had the lock before may have renamed or removed it."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
