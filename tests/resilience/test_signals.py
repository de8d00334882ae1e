"""Stop signals: what they do in each phase, and whose of them count. In real processes, with real signals."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from megalm.resilience.signals import StopRequest

LISTENS = """
import os, subprocess, sys, threading
from megalm.resilience.signals import StopRequest

stop = StopRequest()
stop.watch()
print("ready", flush=True)
for line in sys.stdin:
    word = line.strip()
    if word == "hold":
        stop.hold()
    elif word == "leave":
        stop.leave_with(4)
    elif word == "own":
        os.kill(os.getpid(), 15)
    elif word == "block":  # as a collective does: the main thread runs no Python
        threading.Lock().acquire() or threading.Event().wait()
    print(stop.number, stop.name, flush=True)
"""


class Listener:
    """A process that takes stop signals and says what it has noted; `under`: the words of a launcher around it."""

    def __init__(self, *under: str) -> None:
        command = [*under, sys.executable, "-c", LISTENS]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def asked(self, word: str = "") -> str:
        """What it has noted after `word`; also proof that it lives."""
        assert self.process.stdin is not None
        print(word, file=self.process.stdin, flush=True)
        return self._line()

    def noted(self) -> str:
        """The same, when the thread that takes signals had its turn."""
        time.sleep(0.2)
        return self.asked()


@pytest.fixture
def listener() -> Iterator[Listener]:
    found = Listener()
    yield found
    found.process.kill()
    found.process.communicate()


STOPS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


@pytest.mark.parametrize("number", STOPS)
def test_before_the_first_step_a_signal_ends_the_process_with_75(number: signal.Signals) -> None:
    process = Listener("env", "--default-signal=HUP").process
    process.send_signal(number)
    assert process.wait(timeout=10) == 75


def test_a_signal_is_seen_while_the_main_thread_is_inside_a_library() -> None:
    process = Listener().process
    assert process.stdin is not None
    print("block", file=process.stdin, flush=True)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 75


@pytest.mark.parametrize("number", STOPS)
def test_in_training_the_first_signal_is_noted_and_the_process_goes_on(number: signal.Signals) -> None:
    listener = Listener("env", "--default-signal=HUP")
    assert listener.asked("hold") == "0 no signal"
    listener.process.send_signal(number)
    assert listener.noted() == f"{number:d} {number.name}"
    listener.process.kill()
    listener.process.communicate()


def test_nohup_is_respected() -> None:
    listener = Listener("env", "--ignore-signal=HUP")
    listener.process.send_signal(signal.SIGHUP)
    assert listener.noted() == "0 no signal"
    listener.process.kill()
    listener.process.communicate()


def test_the_first_signal_counts_and_the_users_third_ends_the_process(listener: Listener) -> None:
    listener.asked("hold")
    for number in (signal.SIGUSR1, signal.SIGTERM):
        listener.process.send_signal(number)
        assert listener.noted() == f"{signal.SIGUSR1:d} SIGUSR1"
    listener.process.send_signal(signal.SIGTERM)
    assert listener.process.wait(timeout=10) == 128 + signal.SIGTERM


def test_signals_of_the_process_itself_do_not_add_up_with_the_users(listener: Listener) -> None:
    listener.asked("hold")
    listener.process.send_signal(signal.SIGINT)
    for _ in range(4):
        listener.asked("own")
    assert listener.noted() == f"{signal.SIGINT:d} SIGINT"


def test_signals_of_the_launcher_do_not_add_up_with_the_users(tmp_path: object) -> None:
    """A launcher (a program of that name) passes on what it gets, as often as it gets it."""
    launcher = f"{tmp_path}/torchrun"
    with open(launcher, "w") as stream:
        stream.write(
            "import signal, subprocess, sys\n"
            "rank = subprocess.Popen(sys.argv[1:])\n"
            "signal.signal(signal.SIGTERM, lambda *_: rank.send_signal(signal.SIGTERM))\n"
            "while rank.poll() is None:\n"
            "    try: rank.wait(0.05)\n"
            "    except subprocess.TimeoutExpired: pass\n"
        )
    listener = Listener(sys.executable, launcher)
    listener.asked("hold")
    for _ in range(4):
        listener.process.send_signal(signal.SIGTERM)
        assert listener.noted() == f"{signal.SIGTERM:d} SIGTERM"
    assert listener.process.stdin is not None
    listener.process.stdin.close()  # the rank ends, and the launcher with it
    assert listener.process.wait(timeout=10) == 0


def test_what_has_nothing_left_to_save_ends_with_its_own_code(listener: Listener) -> None:
    listener.asked("hold")
    listener.asked("leave")
    listener.process.send_signal(signal.SIGTERM)
    assert listener.process.wait(timeout=10) == 4


def test_a_signal_that_comes_while_the_ranks_agree_is_for_the_next_time() -> None:
    stop = StopRequest()
    stop.number = signal.SIGTERM  # after this rank said that there is none
    assert not stop.agree(0)
    assert stop.number == signal.SIGTERM
    assert stop.agree(signal.SIGINT)
    assert stop.name == "SIGINT"
