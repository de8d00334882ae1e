"""Documents in a seeded random order, in bounded memory.

The order is that of a hash of (seed, number of the document): documents go to buckets by its highest bits, and each
bucket, small enough for memory, is sorted by it. So the order depends on the seed alone, not on the buckets.
"""

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.data.preprocess.shards import Batch

BUCKET_BYTES = 1 << 25
_PART = struct.Struct("<QQQ")


def keys_of(seed: int, first: int, count: int) -> npt.NDArray[np.uint64]:
    """The sort keys of the documents first .. first + count - 1 (splitmix64 of the seed and the number).

    splitmix64 is a bijection, so no two documents have the same key. Source: Steele, Lea, Flood, "Fast splittable
    pseudorandom number generators", OOPSLA 2014.
    """
    with np.errstate(over="ignore"):
        state = np.arange(first, first + count, dtype=np.uint64) + _mixed(np.array([seed], np.uint64) + _GAMMA)
        return _mixed(state * _GAMMA)


_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mixed(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def shuffled(batches: Iterable[Batch], seed: int, token_bytes: int, scratch: Path) -> Iterator[Batch]:
    """The documents of `batches`, of about `token_bytes` together, in random order."""
    scratch.mkdir(exist_ok=True)
    bits = (token_bytes // BUCKET_BYTES).bit_length()
    paths = [scratch / f"bucket-{number}" for number in range(1 << bits)]
    for path in paths:
        path.write_bytes(b"")
    first = 0
    dtype: np.dtype[Any] = np.dtype(np.uint8)
    for batch in batches:
        keys = keys_of(seed, first, len(batch.counts))
        first, dtype = first + len(keys), batch.tokens.dtype
        buckets = keys >> np.uint64(64 - bits) if bits else np.zeros(len(keys), np.uint64)
        order = np.argsort(keys, kind="stable")
        ordered = _reordered(batch, order)
        cuts = np.searchsorted(buckets[order], np.arange(1 << bits, dtype=np.uint64), side="left").tolist()
        for number, (start, stop) in enumerate(zip(cuts, [*cuts[1:], len(keys)], strict=True)):
            if stop > start:
                _append(paths[number], keys[order][start:stop], _slice(ordered, start, stop))
    for path in paths:
        if path.stat().st_size:
            keys, bucket = _load(path, dtype)
            yield _reordered(bucket, np.argsort(keys, kind="stable"))
        path.unlink()


def _reordered(batch: Batch, order: npt.NDArray[np.int64]) -> Batch:
    """The documents of a batch in another order."""
    counts = batch.counts[order]
    lengths = batch.lengths[_ranges((np.cumsum(batch.counts) - batch.counts)[order], counts)]
    # Views of the documents, not an index of each token: that would take several times the memory of the tokens.
    ends = np.cumsum(batch.tokens_of_documents()).tolist()
    starts = [0, *ends[:-1]]
    pieces = [batch.tokens[starts[number] : ends[number]] for number in order.tolist()]
    return Batch(np.concatenate([batch.tokens[:0], *pieces]), lengths, counts, None)


def _ranges(starts: npt.NDArray[np.integer[Any]], counts: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
    """starts[0] .. starts[0] + counts[0] - 1, then those of 1, and so on."""
    ends = np.cumsum(counts, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - counts), counts) + np.arange(total)


def _slice(batch: Batch, start: int, stop: int) -> Batch:
    sequences = np.concatenate([[0], np.cumsum(batch.counts)])[[start, stop]]
    tokens = np.concatenate([[0], np.cumsum(batch.lengths, dtype=np.int64)])[sequences]
    return Batch(batch.tokens[slice(*tokens)], batch.lengths[slice(*sequences)], batch.counts[start:stop], None)


def _append(path: Path, keys: npt.NDArray[np.uint64], batch: Batch) -> None:
    with open(path, "ab") as stream:
        stream.write(_PART.pack(len(keys), len(batch.lengths), len(batch.tokens)))
        for array in (keys, batch.counts, batch.lengths, batch.tokens):
            stream.write(array.tobytes())


def _load(path: Path, dtype: np.dtype[Any]) -> tuple[npt.NDArray[np.uint64], Batch]:
    kinds: tuple[np.dtype[Any], ...] = (np.dtype(np.uint64), np.dtype(np.int32), np.dtype(np.int32), dtype)
    columns: list[list[npt.NDArray[Any]]] = [[], [], [], []]
    with open(path, "rb") as stream:
        while head := stream.read(_PART.size):
            num_documents, num_sequences, num_tokens = _PART.unpack(head)
            for column, kind, count in zip(
                columns, kinds, (num_documents, num_documents, num_sequences, num_tokens), strict=True
            ):
                column.append(np.frombuffer(stream.read(count * kind.itemsize), kind))
    keys, counts, lengths, tokens = (np.concatenate(column) for column in columns)
    return keys, Batch(tokens, lengths, counts, None)
