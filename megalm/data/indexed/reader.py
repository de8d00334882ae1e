"""Reading PREFIX.bin and PREFIX.idx: sequences and documents of token ids, on demand."""

import functools
import hashlib
import itertools
import mmap
import os
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from megalm.data.indexed import format as index_format
from megalm.data.indexed.format import HEADER
from megalm.errors import DataError
from megalm.storage.faults import reading
from megalm.storage.whole_file import WholeFile

Tokens = npt.NDArray[np.integer[Any]]


class IndexedDataset:
    """The sequences of PREFIX.bin and PREFIX.idx, read on demand; picklable (reopens by prefix).

    `.idx` is memory mapped, and its length looked at before each sample (`require_index`). `.bin` is read with `pread`:
    0.6 microseconds slower per read than a map, but a file that shrinks or a disk that fails is then an error with a
    name, where a map gives SIGBUS.

    Args:
        scan: check every entry of the index; without it only sizes and ends, in constant time.

    Raises:
        DataError: missing, damaged or empty files, or an `.idx` and `.bin` that do not fit each other.
    """

    def __init__(self, prefix: str | os.PathLike[str], *, scan: bool = True) -> None:
        self.prefix = os.fspath(prefix)
        self._scan = scan
        self.vocab_size: int | None = None
        """Number of ids: `gather` and `tokens` refuse a token beyond them. None: any is taken."""
        advice = (
            f"PREFIX={self.prefix} must stand for two files, PREFIX.bin and PREFIX.idx, as `megalm preprocess` writes "
            "them"
        )
        with reading(f"{self.prefix}.idx", DataError, advice):
            self._header = index_format.read_header(f"{self.prefix}.idx")
            self._idx = WholeFile(f"{self.prefix}.idx", "copy it again and resume")
            self._map = mmap.mmap(self._idx.handle, 0, access=mmap.ACCESS_READ)
        with reading(f"{self.prefix}.bin", DataError, advice):
            self._bin = os.open(f"{self.prefix}.bin", os.O_RDONLY | os.O_CLOEXEC)
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
        if scan:
            self._map.madvise(mmap.MADV_DONTNEED)  # the pages that were looked at; they stay in the system's cache

    def require_index(self) -> None:
        """Checks that the mapped index is still as long as it was.

        Raises:
            DataError: the file has become shorter.
        """
        self._idx.require()

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored ids."""
        return self._header.dtype

    @functools.cached_property
    def _unsigned(self) -> np.dtype[np.unsignedinteger[Any]]:
        return np.dtype(f"<u{self.dtype.itemsize}")

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

    @functools.cached_property
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
        self.require_index()
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
        self.require_index()
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
        self.require_index()
        itemsize = self.dtype.itemsize
        position = int(self._pointers[first])
        stop = int(self._pointers[last - 1]) + int(self.sequence_lengths[last - 1]) * itemsize
        while position < stop:
            count = min(limit, (stop - position) // itemsize)
            yield self._read(position, count)
            position += count * itemsize

    def check_token_range(self, limit: int = 1024) -> None:
        """Looks at the first 65,536 tokens of up to `limit` sequences, evenly spread; every token is when it is used.

        Raises:
            DataError: one of them is not below `vocab_size`; names its document and its position.
        """
        for sequence in range(0, len(self), max(1, len(self) // limit)):
            self.require_index()
            self.gather([(sequence, 0, min(int(self.sequence_lengths[sequence]), 1 << 16))])

    def token_position(self, sequence: int) -> int:
        """How many tokens lie before a sequence; for the number of sequences: all tokens."""
        if sequence == len(self):
            return self.num_tokens
        self.require_index()
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def sequence_at(self, position: int) -> int:
        """The sequence that token `position` of the whole file is of."""
        self.require_index()
        return int(np.searchsorted(self._pointers, position * self.dtype.itemsize, side="right")) - 1

    def tokens(self, position: int, count: int) -> Tokens:
        """`count` tokens from token `position` of the whole file on, across sequences, in the stored dtype.

        Raises:
            IndexError: a range beyond the end.
            DataError: the file has become shorter, or cannot be read; a token is not below `vocab_size`.
        """
        if not 0 <= position <= position + count <= self.num_tokens:
            raise IndexError(f"tokens {position} .. {position + count} of {self.num_tokens} in {self.prefix}")
        tokens = self._read(position * self.dtype.itemsize, count)
        if self._has_foreign(tokens):
            first = int(np.flatnonzero(self._foreign(tokens))[0])
            sequence = self.sequence_at(position + first)
            raise self._foreign_token(int(tokens[first]), sequence, position + first - self.token_position(sequence))
        return tokens

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

        The parts are trusted to lie inside their sequences, and the index to be whole (`require_index`).

        Raises:
            DataError: the file has become shorter, or cannot be read; a token is not below `vocab_size`.
        """
        file, pointers, size = self._bin, self._pointers, self.dtype.itemsize
        try:
            raw = b"".join([os.pread(file, n * size, pointers.item(s) + offset * size) for s, offset, n in parts])
        except OSError:
            raw = b""
        if len(raw) == size * sum([n for _, _, n in parts]):
            tokens = np.frombuffer(raw, dtype=self.dtype)
        else:  # the slow way goes on after 2 GiB, and says what is wrong
            tokens = np.concatenate([self._read(int(pointers[s]) + offset * size, n) for s, offset, n in parts])
        if self._has_foreign(tokens):
            position = int(np.flatnonzero(self._foreign(tokens))[0])
            value = int(tokens[position])
            for sequence, offset, count in parts:
                if position < count:
                    raise self._foreign_token(value, sequence, offset + position)
                position -= count
        return tokens

    def _has_foreign(self, tokens: Tokens) -> bool:
        """Whether a token is negative or not below `vocab_size`: one pass over what was read."""
        if self.vocab_size is None or not len(tokens):
            return False
        # the bits of a negative number are those of a large one without a sign
        return int(np.maximum.reduce(tokens.view(self._unsigned))) >= self.vocab_size

    def _foreign(self, tokens: Tokens) -> npt.NDArray[np.bool_]:
        assert self.vocab_size is not None, "only tokens of a known vocabulary are judged"
        outside: npt.NDArray[np.bool_] = (tokens < 0) | (tokens >= self.vocab_size)
        return outside

    def _foreign_token(self, value: int, sequence: int, position: int) -> DataError:
        """The error for a token that the vocabulary lacks, with where it stands."""
        document = int(np.searchsorted(self.document_indices, sequence, side="right")) - 1
        first = int(self.document_indices[document])
        where = f"document {document}"
        if sequence != first:
            position += int(self.sequence_lengths[first:sequence].sum(dtype=np.int64))
            where += f" (sequence {sequence})"
        return DataError(
            f"{self.prefix}.bin: token id {value} at position {position} of {where} is outside 0 .. "
            f"{(self.vocab_size or 0) - 1} (vocab_size={self.vocab_size}); give the tokenizer that the data was made "
            "with, or a larger --vocab-size; or, if the file is damaged, copy it again"
        )

    def _read(self, position: int, count: int) -> Tokens:
        wanted = count * self.dtype.itemsize
        with reading(f"{self.prefix}.bin", DataError, f"that was at byte {position}; the same command goes on"):
            raw = os.pread(self._bin, wanted, position)
            # one pread gives 2 GiB at most
            while 0 < len(raw) < wanted and (more := os.pread(self._bin, wanted - len(raw), position + len(raw))):
                raw += more
        if len(raw) != wanted:
            size = os.fstat(self._bin).st_size
            raise DataError(
                f"{self.prefix}.bin was cut while in use: bytes {position} .. {position + wanted} are wanted, "
                f"the file has {size}; copy it again and resume"
            )
        return np.frombuffer(raw, dtype=self.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), scan=self._scan), (self.prefix,), {"vocab_size": self.vocab_size}


def _add_blocks(digest: Any, file: int, size: int) -> None:
    """Adds 256 blocks of a file to `digest`, spread over its `size` bytes, the first and the last among them."""
    block = 4096
    for number in range(256):
        digest.update(os.pread(file, block, max(0, size - block) * number // 255))
