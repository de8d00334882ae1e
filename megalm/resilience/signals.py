"""SIGTERM, SIGINT and SIGUSR1 ask the run to save at the next step and end; the handler itself only takes a note."""

import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Remembers the first signal that came; `number` is 0 until then. A third signal ends the process at once."""

    def __init__(self) -> None:
        self.number = 0
        self._count = 0

    def listen_early(self) -> None:
        """Take note of SIGUSR1 and SIGUSR2 while the process starts: a scheduler's warning must not end it.

        SIGTERM and SIGINT still end it at once: there is nothing to save yet.
        """
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._note)

    def listen(self) -> None:
        """Install the handlers (main thread only)."""
        for number in _SIGNALS:
            signal.signal(number, self._note)

    @property
    def name(self) -> str:
        """The signal's name."""
        return signal.Signals(self.number).name if self.number else "no signal"

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        self.number = self.number or number
        if self._count >= 3:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
