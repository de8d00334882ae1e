"""Exact deduplication in bounded memory: of documents with equal text, the first in input order stays.

Two passes over files: digests (128 bits) go to partitions by their value; each partition, small enough for memory, is
sorted, and what comes after an equal digest is marked. Which documents stay does not depend on anything but the input.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megalm.data.preprocess.shards import Batch

PARTITION_BYTES = 1 << 25
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<u8")])


def duplicates(batches: Iterable[Batch], num_documents: int, scratch: Path) -> npt.NDArray[np.uint8]:
    """1 for each document, by its number, whose text came before; a file that is mapped, not held."""
    scratch.mkdir(exist_ok=True)
    bits = max(0, (num_documents * _RECORD.itemsize // PARTITION_BYTES).bit_length())
    paths = [scratch / f"digests-{number}" for number in range(1 << bits)]
    for path in paths:
        path.write_bytes(b"")
    _partition(batches, paths, bits)
    flags = np.memmap(scratch / "duplicates", np.uint8, "w+", shape=(max(1, num_documents),))
    for path in paths:
        records = np.fromfile(path, _RECORD)
        records = records[np.lexsort((records["number"], records["low"], records["high"]))]
        again = (records["high"][1:] == records["high"][:-1]) & (records["low"][1:] == records["low"][:-1])
        flags[records["number"][1:][again]] = 1
        path.unlink()
    return flags


def _partition(batches: Iterable[Batch], paths: list[Path], bits: int) -> None:
    first = 0
    for batch in batches:
        assert batch.digests is not None, "the spec asks for digests"
        records = np.empty(len(batch.counts), _RECORD)
        records["high"], records["low"] = batch.digests[:, 0], batch.digests[:, 1]
        records["number"] = np.arange(first, first + len(records))
        first += len(records)
        # The shift is done in two steps, since one of 64 bits is undefined.
        partition = (records["high"] >> np.uint64(63 - bits)) >> np.uint64(1)
        order = np.argsort(partition, kind="stable")
        cuts = np.searchsorted(partition[order], np.arange(len(paths) + 1, dtype=np.uint64))
        for path, start, stop in zip(paths, cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
            if stop > start:
                with open(path, "ab") as stream:
                    records[order[start:stop]].tofile(stream)


def without(batches: Iterable[Batch], flags: npt.NDArray[np.uint8]) -> Iterator[Batch]:
    """The batches without the documents that are marked."""
    first = 0
    for batch in batches:
        stays = np.asarray(flags[first : first + len(batch.counts)]) == 0
        first += len(batch.counts)
        yield batch if stays.all() else select(batch, stays)


def select(batch: Batch, stays: npt.NDArray[np.bool_]) -> Batch:
    """The documents of a batch for which `stays` is true."""
    sequences = np.repeat(stays, batch.counts)
    tokens = np.repeat(sequences, batch.lengths)
    digests = None if batch.digests is None else batch.digests[stays]
    return Batch(batch.tokens[tokens], batch.lengths[sequences], batch.counts[stays], digests)
