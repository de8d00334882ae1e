"""Signals ask a process to stop; only the third of them ends it. In real processes, with real signals."""

import signal
import subprocess
import sys

import pytest

LISTENS = """
import sys
from megalm.resilience.signals import StopRequest

stop = StopRequest()
print(stop.number, stop.name, flush=True)
stop.listen()
print("ready", flush=True)
for line in sys.stdin:
    print(stop.number, stop.name, flush=True)
"""


class Listener:
    """A process that listens for signals and says what it has noted."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LISTENS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.first_line = self._line()
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def noted(self) -> str:
        """What it has noted; also proof that it lives."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        return self._line()


@pytest.fixture
def listener() -> object:
    found = Listener()
    yield found
    found.process.kill()
    found.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_the_first_signal_is_noted_and_the_process_goes_on(listener: Listener, number: signal.Signals) -> None:
    assert listener.first_line == "0 no signal"
    assert listener.noted() == "0 no signal"
    listener.process.send_signal(number)
    assert listener.noted() == f"{number:d} {number.name}"


def test_the_first_signal_counts_and_the_third_ends_the_process(listener: Listener) -> None:
    listener.process.send_signal(signal.SIGUSR1)
    assert listener.noted() == f"{signal.SIGUSR1:d} SIGUSR1"
    listener.process.send_signal(signal.SIGTERM)
    assert listener.noted() == f"{signal.SIGUSR1:d} SIGUSR1"
    listener.process.send_signal(signal.SIGTERM)
    assert listener.process.wait(timeout=10) == -signal.SIGTERM
