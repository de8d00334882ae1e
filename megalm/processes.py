"""What the worker processes of loader and preprocessing do about signals and about the end of their parent."""

import os
import signal
import threading
from collections.abc import Iterable


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
