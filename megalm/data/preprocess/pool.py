"""The workers: processes of this machine, or the ranks of an MPI job; either is an `Executor`."""

import collections
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from megalm.errors import PlatformError
from megalm.processes import follow_parent
from megalm.storage.faults import attempting

UNITS_PER_WORKER = 4
"""Units under way for each worker: one in work, the others waiting or done and not yet their turn."""

T = TypeVar("T")


@contextlib.contextmanager
def local_workers(count: int) -> Iterator[Executor]:
    """`count` worker processes.

    Raises:
        PlatformError: a worker died.
    """
    with attempting("start workers, with semaphores in", "/dev/shm", PlatformError, "free some space there"):
        executor = ProcessPoolExecutor(
            count, multiprocessing.get_context("fork"), initializer=_start_worker, initargs=(os.getpid(),)
        )
    try:
        yield executor
    except BrokenProcessPool as error:
        raise PlatformError(
            "a worker process died; a kill for lack of memory is the usual cause: lower --workers. "
            "Nothing was published; the same command goes on from the shards that are finished"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker(parent: int) -> None:
    # Ctrl-C goes to the whole group; the main process answers it and ends the workers.
    follow_parent(parent, [signal.SIGINT])


def in_order(
    executor: Executor, tasks: Iterator[tuple[Any, T | None]], work: Callable[[Any], T], window: int
) -> Iterator[tuple[Any, T]]:
    """(task, result) in the order of `tasks`, which come with their result where it is known already.

    At most `window` tasks are under way, so what `tasks` reads ahead is bounded.
    """
    pending: collections.deque[tuple[Any, Future[T] | None, T | None]] = collections.deque()

    def finished() -> tuple[Any, T]:
        task, future, known = pending.popleft()
        result = known if future is None else future.result()
        assert result is not None, "a task has its result or is submitted"
        return task, result

    for task, known in tasks:
        if len(pending) == window:
            yield finished()
        pending.append((task, None if known is not None else executor.submit(work, task), known))
    while pending:
        yield finished()
