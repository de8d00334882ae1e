"""Run a plain function on several real ranks (gloo, loopback) and get each rank's result."""

import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from megalm.testing.processes import free_port

WARM = multiprocessing.get_context("forkserver")
"""Starts processes in milliseconds, by forking one that has everything imported."""
WARM.set_forkserver_preload(["pytest", "megalm.testing.preloaded"])  # pytest: a rank imports the test's module


def run_on_ranks(count: int, function: Callable[..., Any], *args: Any, timeout_s: float = 180.0) -> list[Any]:
    """`function(*args)` inside a process group of `count` ranks; what each rank returned, by rank.

    Raises:
        AssertionError: a rank failed (its traceback, tagged with its rank) or the time is over.
    """
    port, ranks, pipes = free_port(), [], []
    for rank in range(count):
        receiver, sender = WARM.Pipe(duplex=False)
        process = WARM.Process(target=_rank, args=(rank, count, port, sender, function, args), daemon=True)
        process.start()
        sender.close()
        ranks.append(process)
        pipes.append(receiver)
    try:
        return _collect(pipes, time.monotonic() + timeout_s)
    finally:
        for process in ranks:
            process.join(timeout=5 if process.exitcode is None else 0)
            if process.is_alive():
                process.kill()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(pipes)) if rank not in results]
            raise AssertionError(f"ranks {missing} did not finish in time")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                ok, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            if not ok:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(rank: int, count: int, port: int, sender: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    from megalm.distributed.environment import LaunchEnvironment, choose_accelerator, prepare_process
    from megalm.distributed.process_group import start_process_group, stop_process_group

    try:
        environment = LaunchEnvironment(
            launcher="test",
            rank=rank,
            world_size=count,
            local_rank=rank,
            local_world_size=count,
            master_addr="127.0.0.1",
            master_port=port,
        )
        prepare_process(environment)
        choose_accelerator(False)
        torch.set_num_threads(1)
        start_process_group(environment, "gloo", 2.0)
        result = function(*args)
        stop_process_group()
        # plain pickle: the pipe's own would hand over tensors as shared memory that ends with this process
        sender.send_bytes(pickle.dumps((True, result)))
    except BaseException:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
