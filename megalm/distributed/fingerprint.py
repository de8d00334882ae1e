"""Fingerprints of tensors: whether two holders of one have the same elements at the same places, without sending them.

A fingerprint is the sum over the elements of bits x an odd number that follows from the place, modulo 2^32: parts that
several ranks hold have their own, and the sum of these is that of the whole. It is no defence against intent.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from megalm.distributed.shards import StateSlice

MODULUS = 1 << 32
_RUN = 1 << 16
"""Places are counted in runs of so many elements, which the cache of a core holds."""
_SPREAD = 2_654_435_769
"""2^32 / golden ratio: keeps the numbers of different runs apart (Knuth, The Art of Computer Programming, 6.4)."""


def fingerprint(values: Tensor, first: int = 0) -> int:
    """Of floating-point values whose first element has the place `first`; fp32 and what it holds exactly."""
    flat, total, place = values.detach().reshape(-1), 0, first
    odd = 2 * torch.arange(min(_RUN, first % _RUN + flat.numel()), dtype=torch.int32, device=flat.device) + 1
    while place < first + flat.numel():
        run, begin = divmod(place, _RUN)
        bits = flat[place - first : place - first + _RUN - begin].float().view(torch.int32)
        total += _dot(bits, odd[begin : begin + bits.numel()]) * (2 * run * _SPREAD + 1)
        place += bits.numel()
    return total % MODULUS


def _dot(bits: Tensor, odd: Tensor) -> int:
    """Modulo 2^32, where int32 wraps; CUDA has no product of vectors of int32."""
    return int(torch.dot(bits, odd) if bits.device.type == "cpu" else (bits.long() * odd).sum())


def is_finite(values: Tensor) -> bool:
    """Whether all of them are; fp32 or less."""
    # what is not finite stays in a sum; finite fp32 numbers may overflow in fp32, in double they do not
    return math.isfinite(float(values.sum())) or math.isfinite(float(values.sum(dtype=torch.float64)))


def of_slices(pieces: Iterable[tuple[StateSlice, Tensor]], dtype: torch.dtype) -> dict[str, int]:
    """By name, of weights in fp32 as a model of type `dtype` computes with them; each lies where its slice says."""
    found: dict[str, int] = {}
    for piece, weight in pieces:
        own = fingerprint(weight.to(dtype), piece.start)
        found[piece.name] = (found.get(piece.name, 0) + own) % MODULUS
    return found
