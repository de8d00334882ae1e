"""This machine's addresses, ports and network interfaces."""

import os
import socket
from collections.abc import Mapping

from megalm.errors import PlatformError

_ELSEWHERE = "10.254.254.254"
"""An address of no machine, to look up the way out of this one."""


def interfaces(environ: Mapping[str, str]) -> list[str]:
    """The network interfaces that the user chose for gloo (GLOO_SOCKET_IFNAME); empty if none."""
    return [name for name in environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]


def check_interfaces(environ: Mapping[str, str]) -> None:
    """Raise unless this machine has the network interfaces that the user chose.

    Raises:
        PlatformError: it has not.
    """
    there = [name for _, name in socket.if_nameindex()]
    for name in interfaces(environ):
        if name not in there:
            raise PlatformError(
                f"GLOO_SOCKET_IFNAME={name} is no network interface of {os.uname().nodename}; it has {', '.join(there)}"
            )


def interface_towards(address: str) -> str | None:
    """The interface for gloo between nodes, or None where it finds the right one by itself.

    gloo listens at the address that the machine's own name resolves to. On many machines (Debian's /etc/hosts, most
    containers) that is the loopback, or none; then it is the interface whose address leads to `address`.
    """
    import psutil

    own = {entry.address: name for name, entries in psutil.net_if_addrs().items() for entry in entries}
    try:
        named = [str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    except OSError:
        named = []
    bound = next((entry for entry in named if entry in own or _is_loopback(entry)), None)
    if bound is not None and not _is_loopback(bound):
        return None
    # on the first node its own name may be the loopback too: then the way out
    ways = [_source_address(destination) for destination in (address, _ELSEWHERE)]
    return next((own[way] for way in ways if way in own and not _is_loopback(way)), None)


def free_port(address: str) -> int:
    """A port on which nobody listens at one of this machine's addresses."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    """Whether somebody listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def own_address(interface: str | None) -> str:
    """An IPv4 address at which other machines reach this one: that of `interface`, or of the way out.

    Raises:
        PlatformError: there is none.
    """
    import psutil

    addresses = {
        name: [entry.address for entry in entries if entry.family == socket.AF_INET]
        for name, entries in psutil.net_if_addrs().items()
    }
    if interface is not None and addresses.get(interface):
        return addresses[interface][0]
    if way_out := _source_address(_ELSEWHERE):
        return way_out
    others = [address for found in addresses.values() for address in found if not address.startswith("127.")]
    if not others:
        raise PlatformError(
            f"{os.uname().nodename} has no address but the loopback; the ranks on other nodes cannot reach it"
        )
    return others[0]


def _is_loopback(address: str) -> bool:
    return address.startswith("127.")


def _source_address(destination: str) -> str | None:
    """The IPv4 address from which this machine reaches another, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((destination, 9))  # a datagram socket: nothing is sent, only a way is looked up
        except OSError:
            return None
        return str(probe.getsockname()[0])
