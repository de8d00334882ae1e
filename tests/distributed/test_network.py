"""Which interface the ranks of several nodes talk over."""

import socket
from typing import Any

import psutil
import pytest

from megalm.distributed import network

OWN = {"lo": "127.0.0.1", "eth0": "192.0.2.7", "ib0": "198.51.100.7"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine with two networks; `named` is what its host name resolves to, `ways` its own address by destination."""
    facts: dict[str, Any] = {"named": [], "ways": {"198.51.100.1": "198.51.100.7", network._ELSEWHERE: "192.0.2.7"}}

    def resolve(*_: object) -> list[tuple[Any, ...]]:
        if not facts["named"]:
            raise OSError("unknown")
        return [(None, None, None, "", (address, 0)) for address in facts["named"]]

    entry = type("Entry", (), {})
    cards = {}
    for name, address in OWN.items():
        cards[name] = [entry()]
        cards[name][0].address = address
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: cards)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(network, "_source_address", lambda destination: facts["ways"].get(destination))
    return facts


@pytest.mark.parametrize("named", [[], ["127.0.1.1"], ["127.0.1.1", "192.0.2.7"]], ids=["unknown", "debian", "both"])
def test_a_machine_whose_name_is_the_loopback_talks_over_the_network_of_the_first_node(
    machine: dict[str, Any], named: list[str]
) -> None:
    machine["named"] = named
    assert network.interface_towards("198.51.100.1") == "ib0"


def test_a_name_with_an_address_of_the_network_decides_itself(machine: dict[str, Any]) -> None:
    machine["named"] = ["192.0.2.7"]
    assert network.interface_towards("198.51.100.1") is None


def test_the_first_node_whose_own_name_is_the_loopback_takes_the_way_out(machine: dict[str, Any]) -> None:
    machine["ways"]["node1"] = "127.0.1.1"
    assert network.interface_towards("node1") == "eth0"
    machine["ways"] = {}
    assert network.interface_towards("node1") is None, "gloo and its message decide"
