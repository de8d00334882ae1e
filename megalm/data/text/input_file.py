"""An input file: opened, decompressed, counted and hashed; damage is an error that names it."""

import errno
import gzip
import hashlib
import io
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from megalm.config.merging.suggest import did_you_mean
from megalm.data.text import foreign, parquet
from megalm.data.text.compression import COMPRESSIONS
from megalm.data.text.formats import CHUNK_BYTES, STDIN, Chunk, Found, Reading, format_of
from megalm.errors import DataError
from megalm.storage.faults import files_beside, refused


class InputFile:
    """An input file that counts and hashes the bytes read from disk, before decompression.

    Raises:
        DataError: no such file, a name that tells no known format, or another one than the content; while reading:
            damaged or cut-off compression.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.format = format_of(path)
        ending = Path(path).suffix.lower()
        self.compression = ending if ending in COMPRESSIONS else None
        self._metered: _MeteredFile | None = None
        self.size, self.modified_ns, self.is_regular = 0, 0, False
        if path == STDIN:
            return
        try:
            found = os.stat(path)
            if not os.access(path, os.R_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            self.size, self.modified_ns, self.is_regular = found.st_size, found.st_mtime_ns, stat.S_ISREG(found.st_mode)
            if self.is_regular:
                self._check_content()
        except OSError as error:
            raise cannot_read(path, error) from error

    def _check_content(self) -> None:
        with open(self.path, "rb", buffering=0) as stream:
            start = stream.read(foreign.SNIFFED_BYTES)
        form = self.format
        problem = foreign.problem_of(self.path, start, is_table=form.is_table, is_json=form.splits_at_lines)
        if problem is not None:
            raise DataError(f"{self.path} cannot be read: {problem}")

    @property
    def bytes_read(self) -> int:
        """Bytes read from disk so far."""
        return self._metered.count if self._metered else 0

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes read so far: of the file after the last chunk."""
        assert self._metered is not None, "nothing was read"
        return self._metered.digest.hexdigest()

    def chunks(self, reading: Reading) -> Iterator[Chunk]:
        """The chunks of the file, in order; closes it at the end."""
        with damage_named(self.path):
            # Descriptor 0 is not ours to close.
            raw = open(0 if self.path == STDIN else self.path, "rb", buffering=0, closefd=self.path != STDIN)  # noqa: SIM115
            with _MeteredFile(raw) as self._metered:
                stream = cast(IO[bytes], io.BufferedReader(self._metered, CHUNK_BYTES))
                if self.compression:
                    stream = COMPRESSIONS[self.compression](stream)
                yield from self.format.chunks(self.path, stream, reading)
                while self._metered.read(CHUNK_BYTES):
                    pass  # what the format did not need belongs to the hash
                if self.compression and not self._metered.count:
                    raise EOFError("it is empty, while even nothing has a header when it is compressed")

    def documents(self, reading: Reading) -> Iterator[Found]:
        """The documents of the file, in order."""
        for chunk in self.chunks(reading):
            yield from self.format.documents(chunk, reading)


class damage_named:  # noqa: N801 (used as a function)
    """Turns what readers and decompressors raise for a damaged file into a DataError that names it."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile, parquet.DamagedError)) or (
            type(error).__name__ == "ZstdError"  # of a package that is loaded only when it is needed
        ):
            raise DataError(f"{self._path} is damaged or cut off: {error}; copy it again") from error
        if isinstance(error, OSError):
            raise cannot_read(self._path, error) from error


class _MeteredFile(io.RawIOBase):
    """A raw file that counts and hashes what is read from it."""

    def __init__(self, raw: io.FileIO) -> None:
        super().__init__()
        self._raw = raw
        self.count = 0
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        read = self._raw.readinto(buffer) or 0
        self.digest.update(memoryview(buffer)[:read])
        self.count += read
        return read

    def close(self) -> None:
        self._raw.close()
        super().close()


def cannot_read(path: str, error: OSError) -> DataError:
    """The error for a file that the system does not let us read."""
    return refused("read", path, error, DataError, "give files that exist" + did_you_mean(path, files_beside(path)))
