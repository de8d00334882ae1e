"""A shard: the tokens of one work unit in one file, which has its final name when it is complete and on disk.

tokens of batch 0 key 0 | of key 1 | ... of batch 1 ... | arrays of the index (numpy .npy, one after another)
| rejected documents, a JSON array a line | JSON about it | u64 positions of arrays, rejected and JSON | magic
"""

import contextlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megalm.storage.atomic import flush_to_disk
from megalm.storage.documents import parse_json
from megalm.storage.durable import open_new, sync_folder

_TRAILER = struct.Struct("<QQQ8s")
_MAGIC = b"MEGASHD2"
_FAULT_BYTES_IN_MEMORY = 1 << 20
DIGEST_BYTES = 16


@dataclass(frozen=True)
class Batch:
    """Some documents of one key."""

    tokens: npt.NDArray[np.integer[Any]]
    """Of all sequences, back to back."""
    lengths: npt.NDArray[np.int32]
    """Tokens of each sequence, none of them 0."""
    counts: npt.NDArray[np.int32]
    """Sequences of each document; 0 for an empty one."""
    digests: npt.NDArray[np.uint64] | None
    """[documents, 2]: a digest of each text, when asked for."""

    def tokens_of_documents(self) -> npt.NDArray[np.int64]:
        """Tokens of each document."""
        sums = np.zeros(len(self.lengths) + 1, np.int64)
        np.cumsum(self.lengths, out=sums[1:])
        ends = np.cumsum(self.counts)
        of_documents: npt.NDArray[np.int64] = sums[ends] - sums[ends - self.counts]
        return of_documents


Fault = tuple[int, int, str, str]
"""(segment of the unit, line from its start, kind, detail) of a document that is rejected."""


class ShardWriter:
    """Writes one shard batch by batch; `commit` gives it its name."""

    def __init__(self, path: Path) -> None:
        self._path, self._partial = path, path.with_suffix(f".{os.getpid()}.partial")
        self._stream: BinaryIO = open_new(self._partial)  # closed by commit and discard
        self._sizes: list[tuple[int, int, int]] = []
        self._arrays: list[list[npt.NDArray[Any]]] = [[], [], []]
        # On disk beyond some size: input may hold nothing but what is rejected.
        self._faults = tempfile.SpooledTemporaryFile(_FAULT_BYTES_IN_MEMORY, dir=str(path.parent))  # noqa: SIM115

    def add_fault(self, fault: Fault) -> None:
        """Notes a document that is left out."""
        self._faults.write(json.dumps(fault).encode() + b"\n")

    def add(self, batches: list[Batch]) -> None:
        """Appends one batch of every key."""
        for batch in batches:
            self._stream.write(np.ascontiguousarray(batch.tokens).data.cast("B") if len(batch.tokens) else b"")
            self._sizes.append((batch.tokens.nbytes, len(batch.lengths), len(batch.counts)))
            self._arrays[0].append(batch.lengths)
            self._arrays[1].append(batch.counts)
            self._arrays[2].append(np.empty((0, 2), np.uint64) if batch.digests is None else batch.digests)

    def commit(self, about: dict[str, Any]) -> None:
        """Brings everything to disk, under the final name."""
        arrays_at = self._stream.tell()
        np.save(self._stream, np.array(self._sizes, np.int64).reshape(-1, 3))
        for parts, empty in zip(self._arrays, (_NO_I32, _NO_I32, _NO_DIGESTS), strict=True):
            np.save(self._stream, np.concatenate([empty, *parts]))
        faults_at = self._stream.tell()
        self._faults.seek(0)
        shutil.copyfileobj(self._faults, self._stream)
        about_at = self._stream.tell()
        self._stream.write(json.dumps(about).encode())
        self._stream.write(_TRAILER.pack(arrays_at, faults_at, about_at, _MAGIC))
        flush_to_disk(self._stream)
        self._stream.close()
        os.replace(self._partial, self._path)
        sync_folder(self._path.parent)

    def discard(self) -> None:
        """Removes what is written; does nothing after `commit`."""
        self._faults.close()
        if not self._stream.closed:
            with contextlib.suppress(OSError):
                self._partial.unlink()
            with contextlib.suppress(OSError):  # what a full disk still has in the buffer is not wanted any more
                self._stream.close()


_NO_I32 = np.empty(0, np.int32)
_NO_DIGESTS = np.empty((0, 2), np.uint64)


def read_about(path: Path) -> dict[str, Any] | None:
    """What was given to `commit`; None when there is no complete shard."""
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            stream.seek(max(0, size - _TRAILER.size))
            _, _, about_at, magic = _TRAILER.unpack(stream.read(_TRAILER.size))
            if magic != _MAGIC:
                return None
            stream.seek(about_at)
            about: Any = parse_json(stream.read(max(0, size - _TRAILER.size - about_at)))
    except (FileNotFoundError, struct.error, ValueError, OverflowError):
        return None
    return about if isinstance(about, dict) else None


def read_faults(path: Path) -> Iterator[Fault]:
    """The rejected documents, in order."""
    with open(path, "rb") as stream:
        stream.seek(-_TRAILER.size, os.SEEK_END)
        _, faults_at, about_at, _ = _TRAILER.unpack(stream.read(_TRAILER.size))
        stream.seek(faults_at)
        while faults_at < about_at:
            line = stream.readline()
            faults_at += len(line)
            segment, number, kind, detail = json.loads(line)
            yield segment, number, kind, detail


def read_batches(path: Path, num_keys: int, key: int, dtype: np.dtype[Any]) -> Iterator[Batch]:
    """The batches of one key, in order."""
    with open(path, "rb") as stream:
        stream.seek(-_TRAILER.size, os.SEEK_END)
        arrays_at, _, _, _ = _TRAILER.unpack(stream.read(_TRAILER.size))
        stream.seek(arrays_at)
        sizes, lengths, counts, digests = (np.load(stream) for _ in range(4))
        position, sequence, document = 0, 0, 0
        for row, (num_bytes, num_sequences, num_documents) in enumerate(sizes.tolist()):
            if row % num_keys == key:
                stream.seek(position)
                tokens = np.frombuffer(stream.read(num_bytes), dtype)
                yield Batch(
                    tokens,
                    lengths[sequence : sequence + num_sequences],
                    counts[document : document + num_documents],
                    digests[document : document + num_documents] if len(digests) else None,
                )
            position += num_bytes
            sequence += num_sequences
            document += num_documents
