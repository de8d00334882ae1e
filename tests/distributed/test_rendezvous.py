"""Where ranks meet: taken ports, other jobs on the same host, a rank 0 that is not there."""

import dataclasses
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from megalm.distributed import rendezvous
from megalm.distributed.environment import LaunchEnvironment
from megalm.distributed.rendezvous import open_store
from megalm.errors import PlatformError

SOON, LONG = timedelta(seconds=1), timedelta(seconds=30)


def place(rank: int, *ports: int, job: str = "", address: str = "127.0.0.1") -> LaunchEnvironment:
    return LaunchEnvironment(
        launcher="srun", rank=rank, world_size=2, local_rank=rank, local_world_size=2, master_addr=address,
        master_port=ports[0], other_ports=ports[1:], job=job,
    )  # fmt: skip


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture
def taken() -> int:
    """A port on which somebody listens who is no store."""
    listener = socket.create_server(("127.0.0.1", 0))
    yield int(listener.getsockname()[1])
    listener.close()


def test_a_taken_port_is_an_error_that_names_its_owner(taken: int) -> None:
    with pytest.raises(PlatformError, match=rf"port {taken} is taken on this machine \(by process \d+, .*python"):
        open_store(place(0, taken), SOON)


def test_ranks_agree_on_the_next_port_if_the_first_is_taken(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_TRY_S", 0.5)
    (free,) = free_ports(1)
    with ThreadPoolExecutor() as pool:
        first, second = (pool.submit(open_store, place(rank, taken, free), LONG) for rank in (0, 1))
        first.result().set("met", "here")
        assert second.result().get("met") == b"here"


def test_two_jobs_that_want_the_same_ports_do_not_mix() -> None:
    ports = free_ports(2)
    ready = threading.Barrier(4)

    def join(rank: int, job: str) -> bytes:
        ready.wait()
        store = open_store(place(rank, *ports, job=job), LONG)
        if rank == 0:
            store.set("name", job)
        found = bytes(store.get("name"))
        ready.wait()  # rank 0 keeps the store until all have read
        return found

    with ThreadPoolExecutor(4) as pool:
        told = {(rank, job): pool.submit(join, rank, job) for job in ("7.0.0", "8.0.0") for rank in (0, 1)}
        for (_, job), found in told.items():
            assert found.result() == job.encode()


def test_a_rank_0_that_is_not_there_is_an_error_that_says_where_it_was_looked_for() -> None:
    (port,) = free_ports(1)
    with pytest.raises(PlatformError, match=rf"rank 1 of 2 found no rank 0 at 127.0.0.1:{port} within .*: .*refused"):
        open_store(place(1, port), SOON)


def test_an_address_that_no_name_server_knows_is_an_error_at_once() -> None:
    with pytest.raises(PlatformError, match=r"'no-such-host.invalid' \(MASTER_ADDR\) has no IP address"):
        open_store(place(1, 1, address="no-such-host.invalid"), LONG)


def test_an_address_that_is_not_rank_0_s_is_an_error_at_once() -> None:
    (port,) = free_ports(1)
    elsewhere = dataclasses.replace(place(0, port, address="255.255.255.255"), local_world_size=1)
    with pytest.raises(PlatformError, match=rf"not reach itself at 255.255.255.255:{port} .*an address of the machine"):
        open_store(elsewhere, LONG)


def test_only_one_rank_speaks_where_rank_0_is_missing() -> None:
    (port,) = free_ports(1)
    environment = LaunchEnvironment(
        launcher="srun", rank=3, world_size=4, local_rank=1, local_world_size=2,
        master_addr="127.0.0.1", master_port=port
    )  # fmt: skip
    with pytest.raises(PlatformError) as refused:
        open_store(environment, SOON)
    assert refused.value.silent
