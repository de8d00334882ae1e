"""The indexed dataset: documents of token ids in PREFIX.bin and PREFIX.idx, as Megatron-LM writes and reads them.

`IndexedDatasetBuilder` writes both files, byte for byte as Megatron's does; `IndexedDataset` reads them.
"""

import array
import contextlib
import functools
import hashlib
import itertools
import mmap
import os
import shutil
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, overload

import numpy as np
import numpy.typing as npt

from megalm.data import index_format
from megalm.data.atomic import flush_to_disk, open_locked, partial_path, publish
from megalm.data.index_format import HEADER, Header, best_dtype
from megalm.errors import DataError

__all__ = ["BuiltFiles", "IndexedDataset", "IndexedDatasetBuilder", "best_dtype"]

Tokens = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, kw_only=True)
class BuiltFiles:
    """What a builder has written."""

    num_sequences: int
    num_documents: int
    num_tokens: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str


class IndexedDatasetBuilder:
    """Writes PREFIX.bin and PREFIX.idx; nothing carries a final name before `finalize`.

    Phases: add_document / add_documents / add_item + end_document / add_index, any number of times; then
    `finalize` (= `prepare`, everything on disk under temporary names; `publish`, the renames, .bin first). As a
    context manager it removes the temporary files when the block ends without `finalize`.

    Raises:
        DataError: an existing dataset without `overwrite`, a second writer of the same prefix, ids that do not fit
            `dtype`, a full disk.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: npt.DTypeLike, *, overwrite: bool = False) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        index_format.code_of(self.dtype)
        self._limits = np.iinfo(self.dtype)
        self._bin_path, self._idx_path = Path(f"{self.prefix}.bin"), Path(f"{self.prefix}.idx")
        self._lengths = array.array("i")
        self._boundaries = array.array("q", [0])
        self._num_tokens = 0
        self._bin_digest = hashlib.sha256()
        self._bin: BinaryIO = open_locked(self._bin_path)
        if not overwrite:
            existing = [str(path) for path in (self._bin_path, self._idx_path) if path.exists()]
            if existing:
                self.discard()
                raise DataError(f"{' and '.join(existing)} exist already; give --overwrite, or another prefix")

    @property
    def num_sequences(self) -> int:
        """Sequences added so far."""
        return len(self._lengths)

    def add_item(self, tokens: npt.ArrayLike) -> None:
        """Appends one sequence to the current document."""
        self._write(self._as_tokens(tokens))
        self._lengths.append(int(np.size(tokens)))

    def end_document(self) -> None:
        """Ends the current document; without sequences since the last end it is an empty document."""
        self._boundaries.append(len(self._lengths))

    def add_document(self, tokens: npt.ArrayLike, lengths: Sequence[int] | None = None) -> None:
        """Appends one document, cut into sequences of `lengths` tokens (default: one sequence)."""
        flat = self._as_tokens(tokens)
        pieces = [len(flat)] if lengths is None else [int(length) for length in lengths]
        if sum(pieces) != len(flat) or min(pieces, default=0) < 0:
            raise DataError(f"{self.prefix}: the lengths {pieces} of a document must add up to its {len(flat)} tokens")
        self._write(flat)
        self._lengths.extend(pieces)
        self.end_document()

    def add_documents(self, tokens: npt.ArrayLike, lengths: npt.NDArray[np.integer[Any]]) -> None:
        """Appends len(lengths) documents of one sequence each, whose tokens lie back to back in `tokens`."""
        flat = self._as_tokens(tokens)
        assert int(lengths.sum()) == len(flat), "lengths of documents must add up to their tokens"
        self._write(flat)
        first = len(self._lengths) + 1
        self._lengths.frombytes(np.ascontiguousarray(lengths, dtype=np.intc).tobytes())
        self._boundaries.frombytes(np.arange(first, first + len(lengths), dtype=np.int64).tobytes())

    def add_index(self, prefix: str | os.PathLike[str]) -> None:
        """Appends a whole dataset of the same dtype.

        Raises:
            DataError: another dtype, or a dataset that does not open.
        """
        other = IndexedDataset(prefix)
        self.add_part(other, 0, len(other.document_indices) - 1)

    def add_part(self, other: "IndexedDataset", start: int, stop: int) -> None:
        """Appends the documents start .. stop of a dataset of the same dtype; copies block by block.

        Raises:
            DataError: another dtype, or a file that is cut off.
        """
        if other.dtype != self.dtype:
            raise DataError(
                f"{other.prefix} holds {other.dtype.name}, {self.prefix} {self.dtype.name}; "
                "only datasets of the same dtype can be merged: preprocess one of them again"
            )
        boundaries = other.document_indices[start : stop + 1]
        first, last = int(boundaries[0]), int(boundaries[-1])
        lengths = other.sequence_lengths[first:last]
        for block in other.blocks(first, last):
            self._write(block)
        shift = len(self._lengths) - first
        self._lengths.frombytes(lengths.tobytes())
        self._boundaries.frombytes((boundaries[1:] + shift).tobytes())

    def finalize(self) -> BuiltFiles:
        """Publishes both files and returns what they hold."""
        files = self.prepare()
        self.publish()
        return files

    def prepare(self) -> BuiltFiles:
        """Writes the index and brings both files to disk, under temporary names."""
        if not self._lengths:
            raise DataError(
                f"{self.prefix} would hold no sequences; an empty dataset cannot be read, so none is written"
            )
        lengths = np.frombuffer(self._lengths, dtype=np.intc).astype("<i4")
        itemsize = self.dtype.itemsize
        pointers = np.cumsum(lengths, dtype="<i8")
        pointers -= lengths
        pointers *= itemsize
        boundaries = np.frombuffer(self._boundaries, dtype="<i8")
        header = Header(dtype=self.dtype, num_sequences=len(lengths), num_boundaries=len(boundaries))
        parts = [header.pack(), lengths.tobytes(), pointers.tobytes(), boundaries.tobytes()]
        with self._writing(), open(partial_path(self._idx_path), "wb") as stream:
            stream.writelines(parts)
            flush_to_disk(stream)
            flush_to_disk(self._bin)
        return BuiltFiles(
            num_sequences=len(lengths),
            num_documents=len(boundaries) - 1,
            num_tokens=self._num_tokens,
            bin_bytes=self._num_tokens * itemsize,
            idx_bytes=header.index_bytes,
            bin_sha256=self._bin_digest.hexdigest(),
            idx_sha256=hashlib.sha256(b"".join(parts)).hexdigest(),
        )

    def publish(self) -> None:
        """Gives both files their final names; a dataset is complete when its .idx is there, so .idx comes last."""
        with self._writing():
            # An old index must never be seen beside new tokens.
            self._idx_path.unlink(missing_ok=True)
            publish(self._bin_path)
            publish(self._idx_path)
        self._bin.close()

    def discard(self) -> None:
        """Removes the temporary files; does nothing after `publish`."""
        if not self._bin.closed:
            for path in (self._bin_path, self._idx_path):
                partial_path(path).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # what a full disk still has in the buffer is not wanted any more
                self._bin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def _as_tokens(self, tokens: npt.ArrayLike) -> Tokens:
        flat = np.asarray(tokens).reshape(-1)
        if flat.size and flat.dtype != self.dtype:
            if not np.issubdtype(flat.dtype, np.integer):
                raise DataError(f"{self.prefix}: token ids must be integers, not {flat.dtype.name}")
            low, high = int(flat.min()), int(flat.max())
            if low < self._limits.min or high > self._limits.max:
                raise DataError(
                    f"{self.prefix}: token ids {low} .. {high} do not fit {self.dtype.name} "
                    f"({self._limits.min} .. {self._limits.max}); use best_dtype(vocab_size)"
                )
        return flat.astype(self.dtype, copy=False)

    def _write(self, flat: Tokens) -> None:
        raw = np.ascontiguousarray(flat).data.cast("B") if flat.size else b""
        with self._writing():
            self._bin.write(raw)
        self._bin_digest.update(raw)
        self._num_tokens += len(flat)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            free = shutil.disk_usage(self._bin_path.parent).free
            raise DataError(
                f"cannot write {self.prefix}: {error.strerror} ({free / 1e6:.0f} MB free); nothing was published"
            ) from error


class IndexedDataset:
    """The sequences of PREFIX.bin and PREFIX.idx, read on demand; picklable (reopens by prefix).

    `.idx` is memory mapped. `.bin` is read with `pread`: 0.6 microseconds slower per read than a map, but a file
    that shrinks or a disk that fails is then an error with a name, where a map gives SIGBUS.

    Args:
        scan: check every length of the index; without it only sizes and ends, in constant time.

    Raises:
        DataError: missing, damaged or empty files, or an `.idx` and `.bin` that do not fit each other.
    """

    def __init__(self, prefix: str | os.PathLike[str], *, scan: bool = True) -> None:
        self.prefix = os.fspath(prefix)
        self._scan = scan
        try:
            self._header = index_format.read_header(f"{self.prefix}.idx")
            with open(f"{self.prefix}.idx", "rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            self._bin = os.open(f"{self.prefix}.bin", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(
                f"cannot read {error.filename}: {error.strerror}; PREFIX={self.prefix} must stand for two files, "
                "PREFIX.bin and PREFIX.idx, as `megalm preprocess` writes them"
            ) from error
        weakref.finalize(self, os.close, self._bin)
        if not scan:
            self._map.madvise(mmap.MADV_RANDOM)  # a look-up reads one page, not what lies around it
        index_format.check_arrays(
            self.prefix,
            self._header,
            self.sequence_lengths,
            self._pointers,
            self.document_indices,
            os.fstat(self._bin).st_size,
            scan=scan,
        )

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored ids."""
        return self._header.dtype

    @functools.cached_property
    def sequence_lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each sequence, int32 [num_sequences], read-only."""
        return np.frombuffer(self._map, "<i4", self._header.num_sequences, HEADER.size)

    @functools.cached_property
    def _pointers(self) -> npt.NDArray[np.int64]:
        count = self._header.num_sequences
        return np.frombuffer(self._map, "<i8", count, HEADER.size + 4 * count)

    @property
    def sequence_pointers(self) -> npt.NDArray[np.int64]:
        """Byte offset of each sequence in `.bin`, int64 [num_sequences], read-only."""
        return self._pointers

    @functools.cached_property
    def document_indices(self) -> npt.NDArray[np.int64]:
        """Document boundaries as sequence numbers, int64 [num_documents + 1], read-only."""
        start = HEADER.size + index_format.SEQUENCE_BYTES * self._header.num_sequences
        return np.frombuffer(self._map, "<i8", self._header.num_boundaries, start)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self._pointers[-1]) // self.dtype.itemsize + int(self.sequence_lengths[-1])

    def __len__(self) -> int:
        """Number of sequences."""
        return self._header.num_sequences

    @overload
    def __getitem__(self, index: int) -> Tokens: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tokens]: ...
    def __getitem__(self, index: int | slice) -> Tokens | list[Tokens]:
        """The tokens of one sequence, or of the sequences `start:stop` (neighbours, read at once)."""
        if not isinstance(index, slice):
            return self.get(index)
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError("slices of an indexed dataset must have step 1")
        lengths = self.sequence_lengths[start:stop].tolist()
        if not lengths:
            return []
        tokens = self._read(int(self._pointers[start]), sum(lengths))
        ends = list(itertools.accumulate(lengths))
        return [tokens[end - length : end] for end, length in zip(ends, lengths, strict=True)]

    def get(self, index: int, offset: int = 0, length: int | None = None) -> Tokens:
        """`length` tokens (default: to the end) of sequence `index` from `offset` on, in the stored dtype.

        Raises:
            IndexError: no such sequence, or a range beyond its end.
            DataError: the file has become shorter, or cannot be read.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)} in {self.prefix}")
        available = int(self.sequence_lengths[index]) - offset
        count = available if length is None else length
        if offset < 0 or not 0 <= count <= available:
            raise IndexError(f"tokens {offset} .. {offset + count} of sequence {index} in {self.prefix}")
        return self._read(int(self._pointers[index]) + offset * self.dtype.itemsize, count)

    def blocks(self, first: int, last: int, limit: int = 1 << 21) -> Iterator[Tokens]:
        """The tokens of the sequences first .. last back to back, at most `limit` at a time.

        Raises:
            DataError: the file has become shorter, or cannot be read.
        """
        if first == last:
            return
        itemsize = self.dtype.itemsize
        position = int(self._pointers[first])
        stop = int(self._pointers[last - 1]) + int(self.sequence_lengths[last - 1]) * itemsize
        while position < stop:
            count = min(limit, (stop - position) // itemsize)
            yield self._read(position, count)
            position += count * itemsize

    def check_token_range(self, vocab_size: int, limit: int = 1024) -> None:
        """Checks the first 65,536 tokens of up to `limit` sequences, evenly spread, for ids not in 0 .. vocab_size - 1.

        Raises:
            DataError: naming the id, its sequence and its position.
        """

        def get(sequence: int) -> Tokens:
            return self.get(sequence, 0, min(int(self.sequence_lengths[sequence]), 1 << 16))

        index_format.check_token_range(get, len(self), vocab_size, f"{self.prefix}.bin", limit)

    def token_position(self, sequence: int) -> int:
        """How many tokens lie before a sequence; for the number of sequences: all tokens."""
        if sequence == len(self):
            return self.num_tokens
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def tokens(self, position: int, count: int) -> Tokens:
        """`count` tokens from token `position` of the whole file on, across sequences, in the stored dtype.

        Raises:
            IndexError: a range beyond the end.
            DataError: the file has become shorter, or cannot be read.
        """
        if not 0 <= position <= position + count <= self.num_tokens:
            raise IndexError(f"tokens {position} .. {position + count} of {self.num_tokens} in {self.prefix}")
        return self._read(position * self.dtype.itemsize, count)

    def fingerprint(self) -> str:
        """SHA-256 that changes when the data does: of the sizes, the lengths and 256 blocks spread over `.bin`.

        Without `scan` 256 blocks of `.idx` stand for the lengths. Computed once.
        """
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(self._map[: HEADER.size])
        if self._scan:
            digest.update(np.ascontiguousarray(self.sequence_lengths).data)
        else:
            with open(f"{self.prefix}.idx", "rb", buffering=0) as stream:
                _add_blocks(digest, stream.fileno(), len(self._map))
        _add_blocks(digest, self._bin, self.num_tokens * self.dtype.itemsize)
        return digest.hexdigest()

    def gather(self, parts: Sequence[tuple[int, int, int]]) -> Tokens:
        """The tokens of `parts` (sequence, offset, length) end to end, in the stored dtype.

        The parts are trusted to lie inside their sequences.

        Raises:
            DataError: the file has become shorter, or cannot be read.
        """
        file, pointers, size = self._bin, self._pointers, self.dtype.itemsize
        try:
            raw = b"".join([os.pread(file, n * size, int(pointers[s]) + offset * size) for s, offset, n in parts])
        except OSError:
            raw = b""
        if len(raw) == size * sum([n for _, _, n in parts]):
            return np.frombuffer(raw, dtype=self.dtype)
        # the slow way goes on after 2 GiB, and says what is wrong
        return np.concatenate([self._read(int(pointers[s]) + offset * size, n) for s, offset, n in parts])

    def _read(self, position: int, count: int) -> Tokens:
        wanted = count * self.dtype.itemsize
        try:
            raw = os.pread(self._bin, wanted, position)
            # one pread gives 2 GiB at most
            while 0 < len(raw) < wanted and (more := os.pread(self._bin, wanted - len(raw), position + len(raw))):
                raw += more
        except OSError as error:
            raise DataError(f"cannot read {self.prefix}.bin at byte {position}: {error.strerror}") from error
        if len(raw) != wanted:
            size = os.fstat(self._bin).st_size
            raise DataError(
                f"{self.prefix}.bin was cut while in use: bytes {position} .. {position + wanted} are wanted, "
                f"the file has {size}; copy it again and resume"
            )
        return np.frombuffer(raw, dtype=self.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), scan=self._scan), (self.prefix,)


def _add_blocks(digest: Any, file: int, size: int) -> None:
    """Adds 256 blocks of a file to `digest`, spread over its `size` bytes, the first and the last among them."""
    block = 4096
    for number in range(256):
        digest.update(os.pread(file, block, max(0, size - block) * number // 255))
