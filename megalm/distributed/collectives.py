"""Small agreements between all ranks, without pickle: JSON values travel as bytes."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megalm.errors import MegalmError
from megalm.storage.faults import unforeseen

T = TypeVar("T")


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


def on_all_ranks(device: torch.device, action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it fails on any with a MegalmError or OSError, no rank goes on.

    Raises:
        MegalmError: the action's own error, on the first rank where it failed.
        PeerError: on every other rank.
    """
    result: T | None = None
    failure: MegalmError | None = None
    try:
        result = action()
    except MegalmError as error:
        failure = error
    except OSError as error:
        failure = unforeseen(error) or MegalmError(str(error))
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
