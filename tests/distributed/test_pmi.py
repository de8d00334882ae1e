"""The exchange with MPICH's mpirun, against a process manager of a few lines. tests/mpi has the real one."""

import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from megalm.distributed import mpi
from megalm.distributed.pmi import broadcast
from megalm.errors import PlatformError

RANKS = 3


def serve(connection: socket.socket, values: dict[str, str], barrier: threading.Barrier) -> None:
    """Answer one rank as hydra does, by version 1 of the wire protocol."""
    with connection.makefile("rw") as lines:
        for line in lines:
            words = dict(word.split("=", 1) for word in line.split())
            answer = {
                "init": "response_to_init pmi_version=1 pmi_subversion=1 rc=0",
                "get_my_kvsname": "my_kvsname kvsname=k",
                "put": "put_result rc=0 msg=success", "barrier_in": "barrier_out", "get": "get_result rc=0 value=",
                "finalize": "finalize_ack",
            }[words["cmd"]]  # fmt: skip
            if words["cmd"] == "put":
                values[words["key"]] = words["value"]
            elif words["cmd"] == "barrier_in":
                barrier.wait(30)
            elif words["cmd"] == "get":
                answer += values[words["key"]]
            print(f"cmd={answer}", file=lines, flush=True)


@pytest.fixture
def handles() -> list[int]:
    """PMI_FD of each rank."""
    values: dict[str, str] = {}
    barrier = threading.Barrier(RANKS)
    pairs = [socket.socketpair() for _ in range(RANKS)]
    for there, _ in pairs:
        threading.Thread(target=serve, args=(there, values, barrier), daemon=True).start()
    yield [here.fileno() for _, here in pairs]
    for here, there in pairs:
        here.close()
        there.close()


def test_all_ranks_get_what_rank_0_chose(handles: list[int]) -> None:
    with ThreadPoolExecutor(RANKS) as pool:
        told = list(pool.map(lambda rank: broadcast(handles[rank], rank, lambda: f"from:{rank}"), range(RANKS)))
    assert told == ["from:0"] * RANKS


def test_a_place_needs_no_mpi4py_under_mpich(handles: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    family = next(family for family in mpi.FAMILIES if family.rank == "PMI_RANK")

    def place(rank: int) -> mpi.MpiRank:
        environ = {"PMI_RANK": rank, "PMI_SIZE": RANKS, "MPI_LOCALRANKID": rank, "MPI_LOCALNRANKS": RANKS}
        given = {name: str(value) for name, value in environ.items()} | {"PMI_FD": str(handles[rank])}
        return mpi.discover(family, given, None)

    with ThreadPoolExecutor(RANKS) as pool:
        places = list(pool.map(place, range(RANKS)))
    assert [found[:5] for found in places] == [(rank, RANKS, rank, RANKS, "127.0.0.1") for rank in range(RANKS)]
    assert len({found.master_port for found in places}) == 1


def test_a_manager_that_answers_something_else_is_an_error() -> None:
    here, there = socket.socketpair()
    with here, there:
        there.sendall(b"cmd=response_to_init rc=-1\n")
        with pytest.raises(PlatformError, match=r"mpirun answered .* to cmd=init .* on PMI_FD; install mpi4py"):
            broadcast(here.fileno(), 0, lambda: "x")
