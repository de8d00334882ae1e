"""Named seeds: the same (seed, purpose, ...) gives the same numbers in every layout and every process."""

import hashlib


def stable_seed(seed: int, *purpose: str | int) -> int:
    """A seed in [0, 2^63) that depends on every part of the name and on nothing else (SHA-256, not `hash`)."""
    name = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
