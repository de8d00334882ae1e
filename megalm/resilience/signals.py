"""Stop signals: before the first step they end the process at once, then they ask it to save and end.

They are blocked, and a thread waits for them: it sees a signal although the main thread is inside a collective, and
learns who sent it. A launcher passes on the signal that its user sent, and SLURM sends several: only what a user sends
counts towards ending a process that is asked to stop already.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
EXIT_STOPPED = 75
"""Exit code after a stop signal (EX_TEMPFAIL: run the same command again); what was trained is saved."""
USER_SIGNALS = 3
"""Signals of the user's that end the process at once, saved or not."""
_LAUNCHERS = {
    "torchrun", "torch.distributed.run", "torch.distributed.launch",
    "deepspeed", "deepspeed.launcher.launch", "deepspeed.launcher.runner",
    "mpirun", "mpiexec", "mpiexec.hydra", "hydra_pmi_proxy", "orterun", "orted", "prte", "prted", "prterun",
    "srun", "slurmstepd:",
}  # fmt: skip
"""What a launcher's processes are called, among the first words of their command line."""


class StopRequest:
    """Remembers the first stop signal; `number` is 0 until then.

    Phases: start (`watch`), train (`hold`), end (`leave_with`).
    """

    def __init__(self, rank: int = 0) -> None:
        self.number = 0
        self.rank = rank
        self._user_signals = 0
        self._launcher: frozenset[int] = frozenset()
        self._act: Callable[[int], None] = self._end_before_training

    def watch(self) -> None:
        """Take the stop signals from now on; call it in the main thread before any other thread starts.

        SIGHUP stays ignored where it is (nohup).
        """
        deaf = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        heard = {number for number in STOP_SIGNALS if not (deaf and number is signal.SIGHUP)}
        self._launcher = _launcher_processes()
        signal.pthread_sigmask(signal.SIG_BLOCK, heard)
        threading.Thread(target=self._watch, args=(heard,), name="stop-signals", daemon=True).start()

    def hold(self) -> None:
        """From now on a signal is remembered: there is something to save."""
        self._act = self._remember

    def leave_with(self, code: int) -> None:
        """From now on a signal ends the process at once with `code`: nothing is left to be saved."""
        self._act = lambda number: os._exit(code)

    def agree(self, number: int) -> bool:
        """Take over the signal that the ranks agreed on, 0 if none; whether there is one.

        One that comes during the exchange is for the next: it is neither answered by this rank alone nor forgotten.
        """
        if number:
            self.number = number
        return number != 0

    @property
    def name(self) -> str:
        """The signal's name."""
        return signal.Signals(self.number).name if self.number else "no signal"

    def _watch(self, heard: set[signal.Signals]) -> None:
        while True:
            received = signal.sigwaitinfo(heard)
            self._user_signals += self._is_of_user(received)
            if self._user_signals >= USER_SIGNALS:
                os._exit(128 + received.si_signo)
            self._act(received.si_signo)

    def _is_of_user(self, received: signal.struct_siginfo) -> bool:
        """Whether a user or the terminal sent it: not this process, its launcher, or the system's (SLURM's root)."""
        by_system = received.si_uid == 0 != os.getuid() and received.si_pid != 0
        return not by_system and received.si_pid != os.getpid() and received.si_pid not in self._launcher

    def _end_before_training(self, number: int) -> None:
        self._say(f"{signal.Signals(number).name} before the first step: nothing to save; run the same command again")
        os._exit(EXIT_STOPPED)

    def _remember(self, number: int) -> None:
        if self.number == 0:
            self.number = number
            self._say(f"{self.name}: the run ends after the running step, saved if it has a folder")

    def _say(self, text: str) -> None:
        if self.rank == 0:
            with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
                print(text, file=sys.stderr, flush=True)


def _launcher_processes() -> frozenset[int]:
    """The processes above this one up to the launcher's own; empty where none of them is a launcher."""
    found: list[int] = []
    launchers = 0
    with contextlib.suppress(psutil.Error):
        for number, process in enumerate(psutil.Process().parents(), 1):
            found.append(process.pid)
            words = {Path(word.split(" ")[0]).name for word in process.cmdline()[:4]}
            if words & _LAUNCHERS:
                launchers = number
    return frozenset(found[:launchers])
