"""Fingerprints of tensors: whether two holders of one have the same elements at the same places, without sending them.

A fingerprint is the sum over the elements of bits x (2 x place + 1), modulo 2^48: parts that several ranks hold have
their own, and the sum of these is that of the whole. It is no defence against intent.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from megalm.distributed.shards import StateSlice

MODULUS = 1 << 48
"""Sums of the fingerprints of 32,768 ranks fit into an int64."""
_CHUNK = {"cpu": 1 << 16}
_LONGEST = 1 << 22
"""Elements looked at together: what fits into the cache of a core, and what keeps a GPU busy."""


def fingerprint(values: Tensor, first: int = 0) -> int:
    """Of floating-point values whose first element has the place `first`; fp32 and what it holds exactly."""
    flat = values.detach().reshape(-1)
    size = min(flat.numel(), _CHUNK.get(flat.device.type, _LONGEST))
    odd = 2 * torch.arange(size, dtype=torch.int64, device=flat.device) + 1
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for begin in range(0, flat.numel(), max(size, 1)):
        bits = flat[begin : begin + size].float().view(torch.int32).long()
        # int64 wraps, which leaves the sum modulo 2^48 as it is
        total += 2 * (first + begin) * bits.sum() + (bits * odd[: bits.numel()]).sum()
    return int(total) % MODULUS


def is_finite(values: Tensor) -> bool:
    """Whether all of them are; fp32 or less."""
    # a sum of fp32 numbers does not overflow in double, and one that is not finite stays in it
    return math.isfinite(float(values.sum(dtype=torch.float64)))


def of_slices(pieces: Iterable[tuple[StateSlice, Tensor]], dtype: torch.dtype) -> dict[str, int]:
    """By name, of weights in fp32 as a model of type `dtype` computes with them; each lies where its slice says."""
    found: dict[str, int] = {}
    for piece, weight in pieces:
        own = fingerprint(weight.to(dtype), piece.start)
        found[piece.name] = (found.get(piece.name, 0) + own) % MODULUS
    return found
