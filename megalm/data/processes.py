"""What the worker processes of loader and preprocessing do about signals and about the end of their parent."""

import os
import signal
import threading
import time


def ignore_signals(*numbers: signal.Signals) -> None:
    """A signal to the whole process group is the main process's to answer, which then ends its workers."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


def exit_with_parent(parent: int) -> None:
    """Ends this process within a second after process `parent` ended, however it ended, from a background thread.

    Otherwise a killed main process leaves workers behind that hold memory, its sockets and its locks.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="exit-with-parent", daemon=True).start()
