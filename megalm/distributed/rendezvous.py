"""Where ranks meet: one store, kept by rank 0 at an address and port that all know, or by the launcher.

Ranks of one machine meet on the loopback. If the port follows from the job, the next candidates are tried where
somebody else listens on it; a rank that reaches a store asks for the job's name, so that jobs on one host do not mix.
"""

import contextlib
import socket
import threading
import time
from datetime import timedelta

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from megalm.distributed.environment import LaunchEnvironment
from megalm.errors import PlatformError
from megalm.waiting import Patience

_JOB = "megalm/job"
_TRY_S = 5.0


def open_store(environment: LaunchEnvironment, timeout: timedelta) -> Store:
    """The store in which the ranks meet, open on this rank.

    Raises:
        PlatformError: the port is taken, the address is unknown or not rank 0's, or nobody answers there in time.
    """
    if environment.rank == 0 and not environment.agent_store:
        return _serve(environment, timeout)
    return _find(environment, timeout)


def _serve(environment: LaunchEnvironment, timeout: timedelta) -> TCPStore:
    """Rank 0: listen on the first free port."""
    ports = (environment.master_port, *environment.other_ports)
    host = "127.0.0.1" if environment.on_loopback else ""
    for port in ports:
        listener = _listen(host, port)
        if listener is not None:
            break
    else:
        raise PlatformError(
            f"port {', '.join(map(str, ports))} is taken on this machine{_owner(ports[0])}; another job may run here "
            "with the same port: give another (--master_port of deepspeed, --master-port of torchrun, else MASTER_PORT)"
        )
    address = "127.0.0.1" if environment.on_loopback else environment.master_addr
    try:
        with socket.create_connection((address, port), timeout=_TRY_S):
            pass  # TCPStore itself would try until the job's time limit
    except OSError as error:
        listener.close()
        raise PlatformError(
            f"rank 0 runs on {socket.gethostname()} and does not reach itself at {address}:{port} ({error}): "
            "MASTER_ADDR must be an address of the machine of rank 0"
        ) from None
    store = TCPStore(
        address,
        port,
        environment.world_size,
        True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    store.set(_JOB, environment.job)
    return store


def _listen(host: str, port: int) -> socket.socket | None:
    """A listening socket, or None if the port is taken; on all addresses if no host is given."""
    both = not host and socket.has_dualstack_ipv6()
    listener = socket.socket(socket.AF_INET6 if both else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a requeued job finds its last connections dying
    if both:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    try:
        listener.bind((host, port))
        listener.listen(4096)
    except OSError:
        listener.close()
        return None
    return listener


def _find(environment: LaunchEnvironment, timeout: timedelta) -> TCPStore:
    """Another rank: look for this job's store until it is there."""
    address, deadline, patience = environment.master_addr, time.monotonic() + timeout.total_seconds(), Patience()
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise PlatformError(f"the meeting address {address!r} (MASTER_ADDR) has no IP address here: {error}") from None
    last = "nobody answered"
    while time.monotonic() < deadline:
        for port in (environment.master_port, *environment.other_ports):
            try:
                store = _connect(environment, port)
            except (OSError, RuntimeError) as error:
                last = str(error).splitlines()[0]
                continue
            if store is not None:
                store.set_timeout(timeout)
                return store
            last = f"the store at port {port} is another job's"
        if patience.is_over() and (environment.local_rank == 0 or environment.rank == 1):
            patience.say(
                f"rank {environment.rank} of {environment.world_size} on {socket.gethostname()} finds no rank 0 at "
                f"{address}:{environment.master_port} ({last}); it was not started, is slower, or cannot be reached "
                "from here (MASTER_ADDR, firewall, other network)"
            )
        time.sleep(0.1)
    refused = PlatformError(
        f"rank {environment.rank} of {environment.world_size} found no rank 0 at {address}:{environment.master_port} "
        f"within {timeout.total_seconds() / 60:g} minutes: {last}; it did not start, or this machine "
        f"({socket.gethostname()}) cannot reach it: check MASTER_ADDR, and GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME "
        "where there are several networks"
    )
    refused.local, refused.silent = environment.rank == 1, environment.local_rank != 0 and environment.rank != 1
    raise refused


def _connect(environment: LaunchEnvironment, port: int) -> TCPStore | None:
    """The store at `port`; None if it is another job's.

    Raises:
        OSError, RuntimeError: nobody listens there, or somebody who keeps no store.
    """
    with socket.create_connection((environment.master_addr, port), timeout=_TRY_S):
        pass  # TCPStore itself would wait for minutes where nobody listens
    found: list[TCPStore | Exception] = []
    # in a thread: TCPStore would wait for ever for the greeting of somebody who keeps no store
    attempt = threading.Thread(target=lambda: found.append(_client(environment, port)), daemon=True)
    attempt.start()
    attempt.join(_TRY_S)
    if not found:
        raise OSError(f"whoever listens at port {port} keeps no store")
    if isinstance(found[0], Exception):
        raise found[0]
    if environment.agent_store:  # the launcher's port is the job's own
        return found[0]
    return found[0] if found[0].get(_JOB).decode() == environment.job else None


def _client(environment: LaunchEnvironment, port: int) -> TCPStore | Exception:
    """The store at `port`, or why there is none."""
    try:
        return TCPStore(
            environment.master_addr,
            port,
            environment.world_size,
            False,
            timeout=timedelta(seconds=_TRY_S),
            wait_for_workers=False,
        )
    except (OSError, RuntimeError) as error:
        return error


def _owner(port: int) -> str:
    """Who listens on a port of this machine, as far as this user may know."""
    import psutil

    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
                return f" (by process {connection.pid}, {psutil.Process(connection.pid).name()})"
    return ""
