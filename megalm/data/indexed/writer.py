"""Writing PREFIX.bin and PREFIX.idx, byte for byte as Megatron-LM's builder does."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from megalm.data.indexed import format as index_format
from megalm.data.indexed.format import HEADER, Header
from megalm.data.indexed.reader import IndexedDataset, Tokens
from megalm.errors import DataError
from megalm.storage.atomic import flush_to_disk, open_locked, partial_path, publish
from megalm.storage.durable import open_new, sha256_of
from megalm.storage.faults import writing

_COPY_BYTES = 1 << 22
_STEP = 1 << 20
"""Sequences and documents of another dataset that are copied together."""


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
    """Writes PREFIX.bin and PREFIX.idx, in memory that does not grow; nothing has a final name before `finalize`.

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
        self._num_sequences = self._num_documents = self._num_tokens = 0
        self._sequence_tokens = 0
        """Tokens of the sequences noted: where the next one starts."""
        self._bin_digest = hashlib.sha256()
        self._bin: BinaryIO = open_locked(self._bin_path)
        self._columns: tuple[BinaryIO, ...] = ()
        if not overwrite:
            existing = existing_files(self.prefix)
            if existing:
                self.discard()
                raise DataError(f"{' and '.join(existing)} exist already; give --overwrite, or another prefix")
        with self.writing():
            self._columns = self._open_columns()

    def _open_columns(self) -> tuple[BinaryIO, BinaryIO, BinaryIO]:
        """The index, which holds lengths so far, and files without a name for offsets and document boundaries.

        The three arrays lie one after another in the index, and their sizes are known at the end only.
        """
        folder = self._bin_path.parent
        index = open_new(partial_path(self._idx_path))  # closed by publish and discard
        index.write(b"\0" * HEADER.size)
        offsets, boundaries = (tempfile.TemporaryFile(dir=folder) for _ in range(2))  # noqa: SIM115 (likewise)
        boundaries.write(np.zeros(1, "<i8").tobytes())
        return index, offsets, boundaries

    @property
    def num_sequences(self) -> int:
        """Sequences added so far."""
        return self._num_sequences

    def add_item(self, tokens: npt.ArrayLike) -> None:
        """Appends one sequence to the current document."""
        flat = self._as_tokens(tokens)
        self._write(flat)
        self._add_sequences(np.array([len(flat)]))

    def end_document(self) -> None:
        """Ends the current document; without sequences since the last end it is an empty document."""
        self._add_boundaries(np.array([self._num_sequences]))

    def add_document(self, tokens: npt.ArrayLike, lengths: Sequence[int] | None = None) -> None:
        """Appends one document, cut into sequences of `lengths` tokens (default: one sequence)."""
        flat = self._as_tokens(tokens)
        pieces = [len(flat)] if lengths is None else [int(length) for length in lengths]
        if sum(pieces) != len(flat) or min(pieces, default=0) < 0:
            raise DataError(f"{self.prefix}: the lengths {pieces} of a document must add up to its {len(flat)} tokens")
        self.add_documents(flat, np.array(pieces, dtype=np.int64), np.array([len(pieces)]))

    def add_documents(
        self,
        tokens: npt.ArrayLike,
        lengths: npt.NDArray[np.integer[Any]],
        counts: npt.NDArray[np.integer[Any]] | None = None,
    ) -> None:
        """Appends documents whose sequences, of `lengths` tokens, lie back to back in `tokens`.

        `counts` says how many sequences each document has (default: one each).
        """
        flat = self._as_tokens(tokens)
        assert int(lengths.sum()) == len(flat), "lengths of documents must add up to their tokens"
        ends = np.arange(1, len(lengths) + 1) if counts is None else np.cumsum(counts, dtype=np.int64)
        self._write(flat)
        self._add_boundaries(self._num_sequences + ends)
        self._add_sequences(lengths)

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
        for block in other.blocks(first, last):
            self._write(block)
        shift = self._num_sequences - first
        for begin in range(1, len(boundaries), _STEP):
            self._add_boundaries(boundaries[begin : begin + _STEP] + shift)
        for begin in range(first, last, _STEP):
            self._add_sequences(other.sequence_lengths[begin : min(last, begin + _STEP)])

    def finalize(self) -> BuiltFiles:
        """Publishes both files and returns what they hold."""
        files = self.prepare()
        self.publish()
        return files

    def prepare(self) -> BuiltFiles:
        """Completes the index and brings both files to disk, under temporary names."""
        if not self._num_sequences:
            raise DataError(
                f"{self.prefix} would hold no sequences; an empty dataset cannot be read, so none is written"
            )
        header = Header(dtype=self.dtype, num_sequences=self._num_sequences, num_boundaries=self._num_documents + 1)
        index, *columns = self._columns
        with self.writing():
            for column in columns:
                column.seek(0)
                shutil.copyfileobj(column, index, _COPY_BYTES)
            index.seek(0)
            index.write(header.pack())
            flush_to_disk(index)
            flush_to_disk(self._bin)
        return BuiltFiles(
            num_sequences=self._num_sequences,
            num_documents=self._num_documents,
            num_tokens=self._num_tokens,
            bin_bytes=self._num_tokens * self.dtype.itemsize,
            idx_bytes=header.index_bytes,
            bin_sha256=self._bin_digest.hexdigest(),
            idx_sha256=sha256_of(partial_path(self._idx_path)),
        )

    def publish(self) -> None:
        """Gives both files their final names; a dataset is complete when its .idx is there, so .idx comes last."""
        with self.writing():
            # An old index must never be seen beside new tokens.
            self._idx_path.unlink(missing_ok=True)
            publish(self._bin_path)
            publish(self._idx_path)
        self._close()

    def discard(self) -> None:
        """Removes the temporary files; does nothing after `publish`."""
        if not self._bin.closed:
            for path in (self._bin_path, self._idx_path):
                with contextlib.suppress(OSError):  # the next writer empties it
                    partial_path(path).unlink()
            self._close()

    def _close(self) -> None:
        for stream in (self._bin, *self._columns):
            with contextlib.suppress(OSError):  # what a full disk still has in the buffer is not wanted any more
                stream.close()

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
        with self.writing():
            self._bin.write(raw)
        self._bin_digest.update(raw)
        self._num_tokens += len(flat)

    def _add_sequences(self, lengths: npt.NDArray[np.integer[Any]]) -> None:
        """Notes sequences, whose tokens may be written already or not yet."""
        ends = self._sequence_tokens + np.cumsum(lengths, dtype=np.int64)
        index, offsets, _ = self._columns
        with self.writing():
            index.write(lengths.astype("<i4").tobytes())
            offsets.write(((ends - lengths) * self.dtype.itemsize).astype("<i8").tobytes())
        self._num_sequences += len(lengths)
        self._sequence_tokens += int(lengths.sum(dtype=np.int64))

    def _add_boundaries(self, sequences: npt.NDArray[np.integer[Any]]) -> None:
        with self.writing():
            self._columns[2].write(sequences.astype("<i8").tobytes())
        self._num_documents += len(sequences)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Names the dataset in what the disk says."""
        with writing(self.prefix, DataError, "nothing was published"):
            yield


def existing_files(prefix: str) -> list[str]:
    """The files of the dataset `prefix` that exist."""
    return [path for path in (f"{prefix}.bin", f"{prefix}.idx") if os.path.exists(path)]
