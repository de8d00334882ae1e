"""Input files to chunks to documents: JSON lines, plain or gzip.

Chunks are cut by the main process, cheaply and at the same places whatever the number of workers; documents are
parsed by the workers. A format is one entry of FORMATS, a compression one entry of COMPRESSIONS.
"""

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from megalm.config.suggest import did_you_mean
from megalm.errors import DataError

CHUNK_BYTES = 1 << 20
"""What a worker gets at a time: large against the cost of a message, small against the memory of a few dozen."""
MAX_LINE_BYTES = 1 << 26
"""A longer line is rejected unread, so that memory stays bounded."""
_TOO_LONG = f"more than {MAX_LINE_BYTES >> 20} MiB"
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Chunk:
    """Some whole lines of a file."""

    path: str
    first_line: int
    """Number of its first line, from 1."""
    content: bytes
    """The lines; empty for one that is too long."""


@dataclass(frozen=True)
class Rejected:
    """A document that cannot be used: where it is, what kind of fault, and the detail."""

    path: str
    line: int
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.kind}: {self.detail}"


@dataclass(frozen=True)
class Format:
    """How files of one kind become chunks and chunks become the texts of `keys`, one tuple a document."""

    chunks: Callable[[str, IO[bytes]], Iterator[Chunk]]
    documents: Callable[[Chunk, tuple[str, ...]], Iterator[tuple[str, ...] | Rejected]]


class InputFile:
    """An input file that counts and hashes the bytes read from disk, before decompression.

    Raises:
        DataError: no such file, or a name that tells no known format; while reading: damaged or cut-off compression.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.format = format_of(path)
        self._decompress = COMPRESSIONS.get(Path(path).suffix)
        try:
            self.size = Path(path).stat().st_size
            self._metered = _MeteredFile(open(path, "rb", buffering=0))  # noqa: SIM115 (closed by chunks)
        except OSError as error:
            raise _cannot_read(path, error) from error

    @property
    def bytes_read(self) -> int:
        """Bytes read from disk so far."""
        return self._metered.count

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes read so far: of the file after the last chunk."""
        return self._metered.digest.hexdigest()

    def chunks(self) -> Iterator[Chunk]:
        """The chunks of the file, in order; closes it at the end."""
        try:
            with self._metered:
                buffered = cast(IO[bytes], io.BufferedReader(self._metered, CHUNK_BYTES))
                yield from self.format.chunks(self.path, self._decompress(buffered) if self._decompress else buffered)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{self.path} is damaged or cut off: {error}; copy it again") from error
        except OSError as error:
            raise _cannot_read(self.path, error) from error


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


def line_chunks(path: str, stream: IO[bytes]) -> Iterator[Chunk]:
    """Cuts a stream into chunks of whole lines; a line longer than MAX_LINE_BYTES becomes an empty chunk."""
    line, rest, too_long = 1, b"", False
    while block := stream.read(CHUNK_BYTES):
        if line == 1 and not rest:
            block = block.removeprefix(BOM)
        cut = block.rfind(b"\n") + 1
        if too_long:
            skipped = block.find(b"\n") + 1
            if skipped == 0:
                continue
            yield Chunk(path, line, b"")
            line, too_long, block, cut = line + 1, False, block[skipped:], cut - skipped
        if cut > 0:
            content, rest = rest + block[:cut], block[cut:]
            yield Chunk(path, line, content)
            line += content.count(b"\n")
        elif len(rest) + len(block) > MAX_LINE_BYTES:
            rest, too_long = b"", True
        else:
            rest += block
    if rest or too_long:
        yield Chunk(path, line, rest)


def json_documents(chunk: Chunk, keys: tuple[str, ...]) -> Iterator[tuple[str, ...] | Rejected]:
    """The texts of `keys` of each JSON line; blank lines are passed over."""
    if not chunk.content:
        yield Rejected(chunk.path, chunk.first_line, "line too long", _TOO_LONG)
        return
    for number, line in enumerate(chunk.content.split(b"\n"), chunk.first_line):
        if len(line) > MAX_LINE_BYTES:
            yield Rejected(chunk.path, number, "line too long", _TOO_LONG)
        elif line and not line.isspace():
            try:
                yield _texts(line, keys)
            except _FaultError as fault:
                yield Rejected(chunk.path, number, fault.kind, fault.detail)


class _FaultError(Exception):
    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


def _texts(line: bytes, keys: tuple[str, ...]) -> tuple[str, ...]:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _FaultError("invalid UTF-8", f"byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise _FaultError("invalid JSON", f"{error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise _FaultError("invalid JSON", str(error)) from None
    if not isinstance(record, dict):
        raise _FaultError("not an object", f"a JSON {type(record).__name__}")
    return tuple(_text(record, key) for key in keys)


def _text(record: dict[str, Any], key: str) -> str:
    if key not in record:
        raise _FaultError(
            "missing key", f'"{key}" is not among {", ".join(list(record)[:8]) or "no keys"}; see --json-keys'
        )
    text = record[key]
    if not isinstance(text, str):
        raise _FaultError("not a string", f'"{key}" holds {type(text).__name__}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _FaultError("lone surrogate", f'character {error.start + 1} of "{key}" is half of a pair') from None
    return text


_JSON_LINES = Format(line_chunks, json_documents)

FORMATS = {".jsonl": _JSON_LINES, ".ndjson": _JSON_LINES, ".json": _JSON_LINES}
"""File name ending (before the compression's) to format."""

COMPRESSIONS: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    ".gz": lambda stream: cast(IO[bytes], gzip.GzipFile(fileobj=stream, mode="rb")),
}
"""File name ending to what decompresses a stream."""


def format_of(path: str) -> Format:
    """The format that the name of a file tells.

    Raises:
        DataError: an ending that is not known.
    """
    suffixes = Path(path).suffixes
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in FORMATS:
        known = ", ".join(FORMATS)
        raise DataError(f"cannot tell the format of {path} from its name; it must end in {known}, or these with .gz")
    return FORMATS[suffixes[-1]]


def _cannot_read(path: str, error: OSError) -> DataError:
    folder = Path(path).parent
    names = [str(p) for p in folder.iterdir() if p.is_file()] if folder.is_dir() and not Path(path).exists() else []
    return DataError(f"cannot read {path}: {error.strerror}; give files that exist{did_you_mean(path, names)}")
