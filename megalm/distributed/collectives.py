"""Small agreements between all ranks, without pickle: JSON values travel as bytes."""

import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megalm.errors import MegalmError
from megalm.storage.faults import unforeseen
from megalm.waiting import speaking

T = TypeVar("T")
_AT = "megalm/at/"
"""Keys of the job's store under which each rank says what it does."""


class PeerError(MegalmError):
    """Another rank failed and says why; this rank ends without a word."""

    silent = True


def gather_json(value: Any, device: torch.device, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's `value` (anything that JSON holds), by rank, on every rank of the group (default: all)."""
    if dist.get_world_size(group) == 1:
        return [value]
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lengths, torch.tensor([own.numel()], device=device), group=group)
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: own.numel()] = own
    received = [torch.zeros_like(padded) for _ in lengths]
    dist.all_gather(received, padded, group=group)
    texts = (bytes(row[: int(length)].cpu().numpy()) for row, length in zip(received, lengths, strict=True))
    return [json.loads(text) for text in texts]


@contextlib.contextmanager
def waiting_for_others(doing: str) -> Iterator[None]:
    """Around collectives: after 20 s in the block this rank says which ranks have not come to it, and what they do."""
    _post(doing, waits=True)
    with speaking(lambda: _awaited(doing)):
        yield
    _post(f"what follows {doing}", waits=False)


def _post(doing: str, *, waits: bool) -> None:
    """Leave in the job's store what this rank does, for those that wait for it."""
    if dist.get_world_size() > 1:
        state = {"host": socket.gethostname(), "doing": doing, "waits": waits}
        distributed_c10d._get_default_store().set(f"{_AT}{dist.get_rank()}", json.dumps(state))


def _awaited(doing: str) -> str:
    """Which ranks have not come to `doing`; empty where another rank says so."""
    ranks = range(dist.get_world_size())
    if len(ranks) == 1:
        return ""
    try:
        store = distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]  # the other connection may be waiting for an answer
        states = [json.loads(store.get(f"{_AT}{rank}")) if store.check([f"{_AT}{rank}"]) else {} for rank in ranks]
    except (RuntimeError, ValueError):
        return ""  # rank 0, which kept the store, is gone
    here = [rank for rank in ranks if states[rank].get("waits")]
    away = [rank for rank in ranks if not states[rank].get("waits")]
    if not here or here[0] != dist.get_rank():
        return ""
    if not away:
        return f"all ranks are at {doing}; the network between them, or a device, is slow or does not answer"
    shown = [f"rank {rank} on {states[rank].get('host', '?')} ({states[rank].get('doing', 'start')})" for rank in away]
    return f"{', '.join(shown[:8])}{', ...' if len(shown) > 8 else ''} did not come to: {doing}"


def on_all_ranks(device: torch.device, action: Callable[[], T], doing: str = "") -> T:
    """Run `action` on every rank; if it fails on any with a MegalmError or OSError, no rank goes on.

    A rank that waits long for others says for which, and what they are `doing`.

    Raises:
        MegalmError: the action's own error, on the first rank where it failed.
        PeerError: on every other rank.
    """
    result: T | None = None
    failure: MegalmError | None = None
    doing = doing or action.__qualname__.split(".")[0]
    _post(doing, waits=False)
    try:
        result = action()
    except MegalmError as error:
        failure = error
    except OSError as error:
        failure = unforeseen(error) or MegalmError(str(error))
    with waiting_for_others(doing):
        failures = gather_json([failure.exit_code, failure.lasting, str(failure)] if failure else None, device)
    failed = [rank for rank, told in enumerate(failures) if told]
    if not failed:
        return result  # type: ignore[return-value]
    if failed[0] == dist.get_rank():
        assert failure is not None
        failure.local = True
        raise failure
    code, lasting, text = failures[failed[0]]
    peer = PeerError(f"rank {failed[0]}: {text}")
    peer.exit_code, peer.lasting = code, lasting
    raise peer
