"""Writing PREFIX.bin and PREFIX.idx, byte for byte as Megatron-LM's builder does."""

import array
import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from megalm.data.indexed import format as index_format
from megalm.data.indexed.format import Header
from megalm.data.indexed.reader import IndexedDataset, Tokens
from megalm.errors import DataError
from megalm.storage.atomic import flush_to_disk, open_locked, partial_path, publish


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
