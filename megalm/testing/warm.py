"""Jobs and commands in processes forked from one that has torch and DeepSpeed imported.

A cold start costs ten seconds of a core for each rank, and twenty for the deepspeed launcher; a warm one costs
nothing. A warm rank is a process of its own: it has the environment, folder, arguments and output of one that the
deepspeed launcher starts, runs the script itself and ends with its exit code. Only the launcher is not there:

    test -> fork server (preloaded.py) -> leader (in the launcher's place, a session of its own) -> ranks
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

from megalm.testing.processes import REPOSITORY, Finished, environment, free_port, kill_group
from megalm.testing.spawner import WARM

_LOOK_S = 0.02
_GRACE_S = 30.0
"""How long the deepspeed launcher waits for ranks that it has asked to end."""


def run(
    *command: str | Path,
    ranks: int | None = None,
    timeout: float = 240,
    cwd: Path = REPOSITORY,
    environ: Mapping[str, str] | None = None,
    of_rank: "Mapping[int, OfRank] | None" = None,
) -> Finished:
    """Run `SCRIPT.py FLAGS...` or `megalm COMMAND...` to its end, on `ranks` ranks, or one process without a launcher.

    `of_rank`: what single ranks have otherwise.

    Raises:
        AssertionError: it did not end within `timeout` seconds; nothing of it is left.
    """
    with Job(*command, ranks=ranks, cwd=cwd, environ=environ, of_rank=of_rank) as job:
        return job.wait(timeout)


@dataclass(frozen=True)
class OfRank:
    """What one rank has otherwise than the others, as ranks on another node may."""

    flags: tuple[str, ...] = ()
    """Words after those of all ranks."""
    cwd: Path | None = None
    environ: Mapping[str, str] = field(default_factory=dict)
    """Variables beside those of all ranks."""
    starts: bool = True
    """The rank is started at all."""


@dataclass(frozen=True)
class _Order:
    words: tuple[str, ...]
    ranks: int | None
    port: int
    cwd: str
    environ: dict[str, str]
    log: str
    of_rank: dict[int, OfRank]


class Job:
    """A command that runs; what is left of it is killed at the end of the `with` block."""

    def __init__(
        self,
        *command: str | Path,
        ranks: int | None = None,
        cwd: Path = REPOSITORY,
        environ: Mapping[str, str] | None = None,
        of_rank: Mapping[int, OfRank] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="megalm-job-")
        self._log = Path(self._folder.name, "log")
        self._words = tuple(str(word) for word in command)
        # threads of one rank would spin for the cores that the other ranks and tests need
        given = environment() | {"OMP_NUM_THREADS": "1"} if environ is None else dict(environ)
        order = _Order(self._words, ranks, free_port(), str(cwd), given, str(self._log), dict(of_rank or {}))
        receiver, sender = WARM.Pipe(duplex=False)
        self._leader = WARM.Process(target=_lead, args=(order, sender), daemon=True)
        self._leader.start()
        sender.close()
        self.pids: list[int] = receiver.recv()
        """The processes of the ranks, by rank."""

    def __enter__(self) -> "Job":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._leader.pid is not None
        with contextlib.suppress(ProcessLookupError):  # all have ended
            kill_group(self._leader.pid)
        self._leader.join()
        self._folder.cleanup()

    @property
    def output(self) -> str:
        """What the ranks wrote until now."""
        return self._log.read_text(errors="replace")

    def wait(self, timeout: float = 240) -> Finished:
        """Wait for the end.

        Raises:
            AssertionError: it did not come within `timeout` seconds.
        """
        self._leader.join(timeout)
        code = self._leader.exitcode
        assert code is not None, f"{self._words} did not end within {timeout} s:\n{self.output}"
        return Finished(code, self.output)

    def wait_for(self, text: str, timeout: float = 100) -> None:
        """Wait until the ranks have written `text`.

        Raises:
            AssertionError: the job ended before, or did not within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while text not in self.output:
            assert self._leader.exitcode is None, f"ended without {text!r}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {text!r} within {timeout} s:\n{self.output}"
            time.sleep(_LOOK_S)


def _lead(order: _Order, sender: Connection) -> None:
    """Start the ranks, wait for them and exit as the deepspeed launcher does."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup; a user's launcher mostly does not
    multiprocessing.current_process().daemon = False  # a rank may start processes
    log = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    pids = []
    for rank in range(order.ranks or 1):
        if not order.of_rank.get(rank, OfRank()).starts:
            continue
        pid = os.fork()
        if pid == 0:
            sender.close()
            os._exit(_rank(order, rank))
        pids.append(pid)
    sender.send(pids)
    sender.close()
    signal.signal(signal.SIGTERM, lambda *_: kill_group(os.getpid()))
    os._exit(_watch(set(pids)) % 256)


def _watch(left: set[int]) -> int:
    """Wait for all ranks. After the first that fails the others are asked to end, then made to; its exit code."""
    code, last = 0, float("inf")
    test = multiprocessing.parent_process()
    assert test is not None
    while left:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            time.sleep(_LOOK_S)
            if not test.is_alive():
                kill_group(os.getpid())
            if time.monotonic() > last:
                _signal(left, signal.SIGKILL)
            continue
        left.discard(pid)
        ended = os.waitstatus_to_exitcode(status)
        if ended and not code:
            code, last = ended, time.monotonic() + _GRACE_S
            _signal(left, signal.SIGTERM)
    return code


def _signal(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)  # not waited for yet, so the number is still this process's


def _rank(order: _Order, rank: int) -> int:
    """Run the command as rank `rank`; its exit code."""
    program, *words = order.words
    own = order.of_rank.get(rank, OfRank())
    variables, marks = {}, []
    if order.ranks is not None:
        variables = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order.ranks, "LOCAL_SIZE": order.ranks,
            "CROSS_RANK": 0, "CROSS_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": order.port,
        }  # fmt: skip
        marks = [] if program == "megalm" else [f"--local_rank={rank}"]  # torchrun starts modules, without it
    os.environ.clear()
    os.environ.update(order.environ | {name: str(value) for name, value in variables.items()} | dict(own.environ))
    os.chdir(own.cwd or order.cwd)
    sys.argv = [str(Path(order.cwd, program)) if own.cwd else program, *marks, *words, *own.flags]
    sys.path[:0] = filter(None, order.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    code = _exit_code_of(sys.argv[0])
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _exit_code_of(program: str) -> int:
    """Run `megalm` or a script; the exit code that Python would end with."""
    from megalm import cli

    try:
        if program == "megalm":
            return cli.main()
        sys.path.insert(0, str(Path(program).absolute().parent))
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
