"""How a rank ends that has an error: one message for the whole job, from the rank that has to say it."""

import contextlib
import os
import re
import sys
import time
import traceback
from pathlib import Path

import megalm
from megalm.distributed.environment import seconds_since_start
from megalm.errors import MegalmError, PlatformError
from megalm.resilience.signals import StopRequest
from megalm.storage.faults import unforeseen

WAIT_FOR_REPORT_S, LONGEST_WAIT_S = 8.0, 60.0
SILENT_WAIT_S = 2.0
"""How much later a rank ends that has nothing to say, so that no launcher ends the one that has before it is said."""
_LOST_PEER = re.compile("Connection (closed|reset) by peer|writev .*Broken pipe")
"""What gloo raises in a rank when another one is gone: not its own fault, and no traceback of its own is of use."""
_NO_ANSWER = re.compile(r"Timed out waiting \d+ms for (send|recv) operation")
"""What gloo raises after --distributed-timeout-minutes."""
_PACKAGE = str(Path(megalm.__file__).parent)


def report_failure(error: Exception, rank: int, stop: StopRequest) -> int:
    """Say what ended this rank, if it is this rank that has to; its exit code (see docs/exit_codes.md).

    From now on `stop` ends this process at once: nothing is left to be saved.
    """
    if isinstance(error, OSError) and (refused := unforeseen(error)) is not None:
        refused.local = True
        error = refused
    if isinstance(error, MegalmError):
        stop.leave_with(error.exit_code)  # the launcher may end this rank, and finds the error's code
        _report(error, rank)
        return error.exit_code
    stop.leave_with(1)
    if _raised_from(error, _LOST_PEER):
        _report_lost_peer(rank)
    elif _raised_from(error, _NO_ANSWER):
        _report_no_answer(error, rank)
        return PlatformError.exit_code
    else:
        print(f"rank {rank} failed:\n{_traceback(error)}", file=sys.stderr, flush=True)
    return 1


def leave(code: int) -> None:
    """End this process at once: peers may be waiting in a collective that will never complete, and threads of torch
    take up to a second to end in good order.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more, or its disk is full
            stream.flush()
    os._exit(code)


def _traceback(error: Exception) -> str:
    return "".join(traceback.format_exception(error))


def _report(error: MegalmError, rank: int) -> None:
    """Print the error once for the whole job.

    What every rank finds, rank 0 says; the others wait until the launcher, seeing rank 0 gone, ends them. If it does
    not, rank 0 did not have the error, and they say it themselves.
    """
    if error.silent or (rank != 0 and not error.local):
        # rank 0 may have come later, and be as slow: it may need as long again
        time.sleep(min(max(WAIT_FOR_REPORT_S, 2 * seconds_since_start()), LONGEST_WAIT_S))
    if error.silent:
        time.sleep(SILENT_WAIT_S)
    else:
        prefix = "error" if rank == 0 else f"error on rank {rank}"
        print(f"{prefix}: {error}", file=sys.stderr, flush=True)


def _raised_from(error: BaseException | None, pattern: re.Pattern[str]) -> bool:
    """Whether an error is of this kind, or was raised from one, as a stage of a pipeline does."""
    while error is not None and not pattern.search(str(error)):
        error = error.__cause__ or error.__context__
    return error is not None


def _report_lost_peer(rank: int) -> None:
    """Say that another rank is gone, and leave the launcher time to find that rank and its exit code first."""
    text = "stopped: the connection to another rank broke; that rank, or the launcher, says why"
    print(f"rank {rank} {text}", file=sys.stderr, flush=True)
    time.sleep(WAIT_FOR_REPORT_S)


def is_own(filename: str) -> bool:
    """Whether a file of a traceback is megalm's own, wherever it and the libraries are installed."""
    return Path(filename).is_relative_to(_PACKAGE)


def _report_no_answer(error: Exception, rank: int) -> None:
    """Say where this rank waited for another one in vain."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_own(frame.filename)]
    where = f" in {frames[-1].name} ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    print(
        f"error on rank {rank}: another rank did not answer within --distributed-timeout-minutes{where}: it hangs, or "
        "the network to it is cut; the same command continues from the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
