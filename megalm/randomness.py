"""Named seeds: the same (seed, purpose, ...) gives the same numbers in every layout and every process.

All are hashes of the name "seed/purpose/...", so that two purposes never draw the same numbers (SHA-2 and SHA-3, not
Python's `hash`, which differs from process to process).
"""

import hashlib


def stable_seed(seed: int, *purpose: str | int) -> int:
    """A seed in [0, 2^63) that depends on every part of the name and on nothing else."""
    return int.from_bytes(_digest(seed, *purpose)[:8], "little") >> 1


def stable_seed_32(seed: int, *purpose: str | int) -> int:
    """The same in [0, 2^32), as numpy's legacy RandomState takes it."""
    return int.from_bytes(_digest(seed, *purpose)[:4], "little")


def stable_words(count: int, *name: str | int) -> list[int]:
    """`count` numbers in [0, 2^64) that depend on the name: the keys of a keyed function."""
    digest = hashlib.shake_256(_joined(*name)).digest(8 * count)
    return [int.from_bytes(digest[8 * k : 8 * k + 8], "little") for k in range(count)]


def purpose_number(purpose: str) -> int:
    """A purpose as one integer, its bytes, for generators whose seed is a list of integers."""
    return int.from_bytes(purpose.encode(), "little")


def _digest(*name: str | int) -> bytes:
    return hashlib.sha256(_joined(*name)).digest()


def _joined(*name: str | int) -> bytes:
    return "/".join(str(part) for part in name).encode()
