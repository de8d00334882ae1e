"""The key-value exchange that MPICH's mpirun offers its processes on PMI_FD, without any MPI library.

Needed because mpi4py's wheel loads MPICH under one file name only, which not every distribution gives it. Process
Management Interface, wire protocol version 1: lines of key=value (Balaji et al., PMI: a scalable parallel
process-management interface, EuroMPI 2010).
"""

import os
from collections.abc import Callable

from megalm.errors import PlatformError

_KEY = "megalm-meeting"


def broadcast(handle: int, rank: int, choose: Callable[[], str]) -> str:
    """What rank 0 chose, on every rank of the job; `handle` is the number in PMI_FD. Once a process.

    Raises:
        PlatformError: mpirun does not answer as the protocol says.
    """
    with os.fdopen(handle, "r", encoding="ascii", closefd=False) as answers:

        def ask(command: str, expected: str) -> dict[str, str]:
            os.write(handle, f"cmd={command}\n".encode("ascii"))
            answer = dict(word.split("=", 1) for word in answers.readline().split() if "=" in word)
            if answer.get("cmd") != expected or answer.get("rc", "0") != "0":
                raise PlatformError(f"mpirun answered {answer or 'nothing'} to cmd={command} on PMI_FD; install mpi4py")
            return answer

        ask("init pmi_version=1 pmi_subversion=1", "response_to_init")
        space = ask("get_my_kvsname", "my_kvsname")["kvsname"]
        if rank == 0:
            ask(f"put kvsname={space} key={_KEY} value={choose()}", "put_result")
        ask("barrier_in", "barrier_out")
        chosen = ask(f"get kvsname={space} key={_KEY}", "get_result")["value"]
        ask("finalize", "finalize_ack")
    return chosen
