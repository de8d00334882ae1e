"""Waits that speak: whoever waits for long says for what, and why that may be."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SPEAK_AFTER_S = 20.0
"""How long a process waits in silence; it speaks again each time the wait has become twice as long."""


class Patience:
    """Says when it is time to speak, to whoever waits by looking again and again."""

    def __init__(self, after_s: float | None = None) -> None:
        self._begin = time.monotonic()
        self._next_s = SPEAK_AFTER_S if after_s is None else after_s

    @property
    def waited_s(self) -> float:
        """Seconds since the wait began."""
        return time.monotonic() - self._begin

    def is_over(self) -> bool:
        """Whether it is time to speak (again)."""
        if self.waited_s < self._next_s:
            return False
        self._next_s *= 2
        return True

    def say(self, text: str) -> None:
        """Print what is waited for, and since when."""
        print(f"waiting for {self.waited_s:.0f} s: {text}", file=sys.stderr, flush=True)


@contextmanager
def speaking(text: Callable[[], str], after_s: float | None = None) -> Iterator[None]:
    """Prints `text()` when the block takes longer than 20 s, and at each doubling; an empty text is not printed.

    For waits inside a library, which give no control in between: another thread speaks, so `text` must not use what
    the block itself is using.
    """
    done, patience = threading.Event(), Patience(after_s)

    def watch() -> None:
        while not done.wait(0.25):
            if patience.is_over() and (words := text()):
                patience.say(words)

    watcher = threading.Thread(target=watch, name="speaking", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
