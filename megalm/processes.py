"""A process's beginning, and what becomes of it when those around it go: its parent, or who reads what it prints."""

import contextlib
import errno
import gc
import io
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """No search for garbage inside, while libraries are imported, or until `begin_collecting`.

    What they make stays: a rank that looked through it again and again would take a fifth longer to start.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def begin_collecting() -> None:
    """From here on garbage is looked for, among what is made later."""
    gc.freeze()
    gc.enable()


def follow_parent(parent: int, deaf_to: Iterable[signal.Signals]) -> None:
    """Makes this worker end within a second after process `parent`, and hear `deaf_to` from `parent` only.

    A signal to the whole process group is the main process's to answer, which then ends its workers; a killed main
    process must not leave workers behind that hold memory, its sockets and its locks. Call it before other threads
    start: they inherit the signal mask, and the signals then come to the watching thread alone.
    """
    signals = frozenset(deaf_to)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def watch() -> None:
        while os.getppid() == parent:
            received = signal.sigtimedwait(signals, 1.0)
            if received is not None and received.si_pid == parent:
                break
        os._exit(1)

    threading.Thread(target=watch, name="follow-parent", daemon=True).start()


class UnreadFile(io.FileIO):
    """A descriptor that is written to. Once its reader is gone (`| head`, a closed terminal) what follows is lost,
    without an error: nobody waits for it, and who prints has other work.
    """

    def write(self, data: Any, /) -> int:
        """Write, or turn the descriptor, and so everything else that writes to it, to /dev/null."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(memoryview(data).cast("B"))


def outlive_readers() -> None:
    """From now on standard output and error may lose their readers."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        buffer = getattr(stream, "buffer", None)
        raw = getattr(buffer, "raw", buffer)  # under PYTHONUNBUFFERED there is no buffer
        if isinstance(raw, io.FileIO) and not isinstance(raw, UnreadFile) and raw.fileno() == descriptor:
            stream.flush()
            unread = UnreadFile(descriptor, "wb", closefd=False)
            wrapped = io.TextIOWrapper(
                unread if raw is buffer else io.BufferedWriter(unread),  # type: ignore[type-var]
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, wrapped)
