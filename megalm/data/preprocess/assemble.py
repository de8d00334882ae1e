"""Shards to a dataset: .bin and .idx written from beginning to end, with nothing held but one batch."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megalm.data.indexed.format import HEADER, Header
from megalm.data.indexed.writer import BuiltFiles
from megalm.data.preprocess.shards import Batch
from megalm.errors import DataError
from megalm.storage.atomic import flush_to_disk, open_locked, partial_path, publish
from megalm.storage.durable import sha256_of

_COPY_BYTES = 1 << 22


class DatasetWriter:
    """Writes PREFIX.bin and PREFIX.idx batch by batch, in memory that does not grow with the dataset.

    Phases: add any number of batches -> prepare (everything on disk, under temporary names) -> publish (the renames).
    As a context manager it removes its temporary files.

    Raises:
        DataError: a second writer of the same prefix, or a full disk.
    """

    def __init__(self, prefix: str, dtype: np.dtype[Any], scratch: Path) -> None:
        self.prefix, self._dtype = prefix, dtype
        self._bin_path, self._idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        self._bin = open_locked(self._bin_path)
        # The index holds three arrays one after another, whose sizes are known at the end only.
        self._idx: BinaryIO = open(partial_path(self._idx_path), "wb")  # noqa: SIM115 (closed by __exit__)
        self._columns: list[BinaryIO] = [open(scratch / f"{name}.column", "w+b") for name in ("offsets", "bounds")]  # noqa: SIM115
        self._digest = hashlib.sha256()
        self._num_sequences = self._num_documents = self._num_tokens = 0
        self._idx.write(b"\0" * HEADER.size)
        self._columns[1].write(np.zeros(1, "<i8").tobytes())

    def add(self, batch: Batch) -> None:
        """Appends the documents of a batch."""
        with self.writing():
            raw = np.ascontiguousarray(batch.tokens).data.cast("B") if len(batch.tokens) else b""
            self._bin.write(raw)
            self._digest.update(raw)
            ends = np.cumsum(batch.lengths, dtype=np.int64)
            offsets = (self._num_tokens + ends - batch.lengths) * self._dtype.itemsize
            self._idx.write(batch.lengths.astype("<i4").tobytes())
            self._columns[0].write(offsets.astype("<i8").tobytes())
            bounds = self._num_sequences + np.cumsum(batch.counts, dtype=np.int64)
            self._columns[1].write(bounds.astype("<i8").tobytes())
        self._num_tokens += len(batch.tokens)
        self._num_sequences += len(batch.lengths)
        self._num_documents += len(batch.counts)

    @property
    def num_sequences(self) -> int:
        """Sequences added so far."""
        return self._num_sequences

    def prepare(self) -> BuiltFiles:
        """Completes the index and brings both files to disk, under temporary names."""
        header = Header(dtype=self._dtype, num_sequences=self._num_sequences, num_boundaries=self._num_documents + 1)
        with self.writing():
            for column in self._columns:
                column.seek(0)
                shutil.copyfileobj(column, self._idx, _COPY_BYTES)
            self._idx.seek(0)
            self._idx.write(header.pack())
            flush_to_disk(self._idx)
            flush_to_disk(self._bin)
        return BuiltFiles(
            num_sequences=self._num_sequences,
            num_documents=self._num_documents,
            num_tokens=self._num_tokens,
            bin_bytes=self._num_tokens * self._dtype.itemsize,
            idx_bytes=header.index_bytes,
            bin_sha256=self._digest.hexdigest(),
            idx_sha256=sha256_of(partial_path(self._idx_path)),
        )

    def publish(self) -> None:
        """Gives both files their final names; a dataset is complete when its .idx is there, so .idx comes last."""
        with self.writing():
            # An old index must never be seen beside new tokens.
            self._idx_path.unlink(missing_ok=True)
            publish(self._bin_path)
            publish(self._idx_path)
        self._bin.close()

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._bin.closed:
            for path in (self._bin_path, self._idx_path):
                partial_path(path).unlink(missing_ok=True)
        for stream in (self._bin, self._idx, *self._columns):
            with contextlib.suppress(OSError):  # what a full disk still has in the buffer is not wanted any more
                stream.close()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Names the dataset in what the disk says."""
        try:
            yield
        except OSError as error:
            free = shutil.disk_usage(self._bin_path.parent).free
            raise DataError(
                f"cannot write {self.prefix}: {error.strerror} ({free / 1e6:.0f} MB free); nothing was published"
            ) from error


def exists(prefix: str) -> list[str]:
    """The files of the dataset `prefix` that exist."""
    return [path for path in (f"{prefix}.bin", f"{prefix}.idx") if os.path.exists(path)]
