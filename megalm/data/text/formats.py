"""Streams to chunks to documents: JSON lines, plain text and Parquet.

A chunk is some whole documents of one file, small against memory; documents are parsed from chunks. A format is one
entry of FORMATS, a compression one entry of COMPRESSIONS.
"""

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from megalm.data.text import parquet
from megalm.data.text.compression import COMPRESSIONS
from megalm.data.text.utf8 import utf8_length
from megalm.errors import DataError

CHUNK_BYTES = 1 << 20
"""Text of one chunk: large against the cost of a call, small against the memory of a process."""
MAX_LINE_BYTES = 1 << 26
"""A longer document is rejected unread, so that memory stays bounded."""
BOM = b"\xef\xbb\xbf"
STDIN = "-"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How documents are taken from files."""

    keys: tuple[str, ...] = ("text",)
    """Keys of a JSON record, columns of a Parquet table; a text file fills every key."""
    max_line_bytes: int = MAX_LINE_BYTES
    text_documents: Literal["blank-lines", "line", "file"] = "blank-lines"
    """What is a document in a .txt file: what stands between blank lines, a line, or the file."""
    repair: bool = False
    """Read bytes that are not UTF-8, and halves of surrogate pairs, as U+FFFD; else they are faults."""


@dataclass(frozen=True)
class Chunk:
    """Some whole documents of a file."""

    path: str
    first_line: int
    """Number of its first line or row, from 1; counted from the start of the part of the file that is read."""
    num_lines: int
    content: bytes = b""
    """The lines; empty for a document that is too long."""
    columns: tuple[list[Any], ...] | None = None
    """In place of `content`: the values of each key."""


@dataclass(frozen=True)
class Document:
    """A document that can be used."""

    line: int
    texts: tuple[str, ...]
    """One text per key."""
    repaired: bool = False
    """U+FFFD stands for something that was not Unicode (`Reading.repair`)."""


@dataclass(frozen=True)
class Rejected:
    """A document that cannot be used: where it is, what kind of fault, and the detail."""

    path: str
    line: int
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.kind}: {self.detail}"


Found = Document | Rejected


@dataclass(frozen=True)
class Format:
    """How files of one kind become chunks, and chunks documents."""

    chunks: Callable[[str, IO[bytes], Reading], Iterator[Chunk]]
    documents: Callable[[Chunk, Reading], Iterator[Found]]
    splits_at_lines: bool = False
    """A document is a line: a file that is not compressed can be read from any line on."""
    is_table: bool = False
    """Made of row groups, which can be read on their own; not a stream."""


class LineRange(io.RawIOBase):
    """The lines of `raw` whose first byte lies in start .. stop - 1, as a stream.

    Ranges that lie end to end give each line of the file to exactly one of them.
    """

    def __init__(self, raw: IO[bytes], start: int, stop: int) -> None:
        super().__init__()
        self._raw, self._stop = raw, stop
        self._position, self._ended = start, False
        self._last_byte = b"\n"
        if start > 0:
            self._skip_to_line_start(start)

    def _skip_to_line_start(self, start: int) -> None:
        # A line starts at `start` when the byte before it ends one.
        position = start - 1
        self._raw.seek(position)
        while position < self._stop - 1:
            block = self._raw.read(min(CHUNK_BYTES, self._stop - 1 - position))
            if not block:
                break
            found = block.find(b"\n")
            if found >= 0:
                self._position = position + found + 1
                self._raw.seek(self._position)
                return
            position += len(block)
        self._ended = True

    def readable(self) -> bool:
        """True: it is for reading."""
        return True

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes; fewer only at the end."""
        assert size > 0, "a range is read block by block"
        if self._ended:
            return b""
        within = self._stop - self._position
        if within <= 0 and self._last_byte == b"\n":
            self._ended = True
            return b""
        block = self._raw.read(min(size, within) if within > 0 else size)
        if within <= 0 and (end := block.find(b"\n") + 1):
            block, self._ended = block[:end], True
        self._position += len(block)
        self._last_byte = block[-1:]
        self._ended = self._ended or not block
        return block


def line_chunks(path: str, stream: IO[bytes], reading: Reading) -> Iterator[Chunk]:
    """Cuts a stream into chunks of whole lines; a line longer than `max_line_bytes` becomes an empty chunk."""
    line, rest, too_long = 1, b"", False
    while block := stream.read(CHUNK_BYTES):
        cut = block.rfind(b"\n") + 1
        if too_long:
            skipped = block.find(b"\n") + 1
            if skipped == 0:
                continue
            yield Chunk(path, line, 1)
            line, too_long, block, cut = line + 1, False, block[skipped:], cut - skipped
        if cut > 0:
            content, rest = rest + block[:cut], block[cut:]
            yield Chunk(path, line, lines := content.count(b"\n"), content)
            line += lines
        elif len(rest) + len(block) > reading.max_line_bytes:
            rest, too_long = b"", True
        else:
            rest += block
    if rest or too_long:
        yield Chunk(path, line, 1, rest)


def json_documents(chunk: Chunk, reading: Reading) -> Iterator[Found]:
    """The texts of the keys of each JSON line; blank lines are passed over."""
    if not chunk.content:
        yield _too_long(chunk.path, chunk.first_line, reading)
        return
    for number, line in enumerate(chunk.content.split(b"\n"), chunk.first_line):
        line = line.removeprefix(BOM)  # of any line: files with BOMs are put together with `cat`
        if len(line) > reading.max_line_bytes:
            yield _too_long(chunk.path, number, reading)
        elif line and not line.isspace():
            try:
                yield _record(number, line, reading)
            except _FaultError as fault:
                yield Rejected(chunk.path, number, fault.kind, fault.detail)


def _too_long(path: str, line: int, reading: Reading) -> Rejected:
    return Rejected(path, line, "line too long", f"more than {reading.max_line_bytes:,} bytes; see --max-line-mb")


class _FaultError(Exception):
    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


def _record(number: int, line: bytes, reading: Reading) -> Document:
    content, repaired = _decoded(line, reading, "of the line")
    try:
        record = json.loads(content)
    except json.JSONDecodeError as error:
        raise _FaultError("invalid JSON", f"{error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise _FaultError("invalid JSON", str(error)) from None
    if not isinstance(record, dict):
        raise _FaultError("not an object", f"a JSON {type(record).__name__}")
    return _document(number, [_value(record, key) for key in reading.keys], reading, repaired=repaired)


def _decoded(content: bytes, reading: Reading, where: str) -> tuple[str, bool]:
    """(text, whether it was repaired)."""
    try:
        return content.decode(), False
    except UnicodeDecodeError as error:
        if reading.repair:
            return content.decode(errors="replace"), True
        raise _FaultError("invalid UTF-8", f"byte {error.start + 1} {where}") from None


def _value(record: dict[str, Any], key: str) -> Any:
    if key not in record:
        raise _FaultError(
            "missing key", f'"{key}" is not among {", ".join(list(record)[:8]) or "no keys"}; see --json-keys'
        )
    return record[key]


def _document(line: int, values: Iterable[Any], reading: Reading, *, repaired: bool = False) -> Document:
    found = [_text(value, key, reading) for value, key in zip(values, reading.keys, strict=True)]
    return Document(line, tuple(text for text, _ in found), repaired or any(changed for _, changed in found))


_JSON_NAMES = {"NoneType": "null", "bool": "true or false", "int": "a number", "float": "a number", "dict": "an object"}


def _text(text: Any, key: str, reading: Reading) -> tuple[str, bool]:
    """(text, whether it was repaired)."""
    if isinstance(text, bytes):  # a binary column of a table, as some writers store texts
        return _decoded(text, reading, f'of "{key}"')
    if not isinstance(text, str):
        raise _FaultError(
            "not a string", f'"{key}" holds {_JSON_NAMES.get(type(text).__name__, "a " + type(text).__name__)}'
        )
    try:
        utf8_length(text)
    except UnicodeEncodeError as error:
        if reading.repair:
            # "?" is what a codec puts for what it cannot encode; U+FFFD is Unicode's own sign for it
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), True
        raise _FaultError("lone surrogate", f'character {error.start + 1} of "{key}" is half of a pair') from None
    return text, False


_BLANK_LINE = re.compile(rb"\n(?:[ \t\r]*\n)+")
_LEADING_BLANK_LINES = re.compile(rb"(?:[ \t\r]*\n)*")


def text_chunks(path: str, stream: IO[bytes], reading: Reading) -> Iterator[Chunk]:
    """Cuts a text file into chunks of whole documents: at blank lines, at each line, or the file as one."""
    if reading.text_documents == "line":
        yield from line_chunks(path, stream, reading)
        return
    if reading.text_documents == "file":
        content = stream.read(reading.max_line_bytes + 1)
        while len(content) > reading.max_line_bytes and stream.read(CHUNK_BYTES):
            pass  # to the end, so that damage is noticed and the whole file is hashed
        if content:
            yield Chunk(path, 1, content.count(b"\n") + 1, content if len(content) <= reading.max_line_bytes else b"")
        return
    first_line, lines, rest, too_long = 1, 0, b"", False
    for piece in line_chunks(path, stream, reading):
        too_long = too_long or not piece.content or len(rest) > reading.max_line_bytes
        lines += piece.num_lines
        content, rest = (b"\n" if too_long else rest) + piece.content, b""
        if too_long and (found := _BLANK_LINE.search(content)):
            content, too_long = content[found.end() :], False
            passed = lines - content.count(b"\n")
            yield Chunk(path, first_line, passed)
            first_line, lines = first_line + passed, lines - passed
        if too_long:
            continue
        cut = max((found.end() for found in _BLANK_LINE.finditer(content)), default=0)
        rest = content[cut:]
        if cut:
            yield Chunk(path, first_line, passed := content.count(b"\n", 0, cut), content[:cut])
            first_line, lines = first_line + passed, lines - passed
    if rest or too_long:
        yield Chunk(path, first_line, lines, b"" if too_long or len(rest) > reading.max_line_bytes else rest)


def text_documents(chunk: Chunk, reading: Reading) -> Iterator[Found]:
    """The documents of a chunk of text; every key gets the same text."""
    if not chunk.content:
        yield _too_long(chunk.path, chunk.first_line, reading)
        return
    for line, part in _PARTS[reading.text_documents](chunk):
        body = part.removeprefix(BOM)
        if len(body) > reading.max_line_bytes:
            yield _too_long(chunk.path, line, reading)
            continue
        try:
            text, repaired = _decoded(body, reading, "of the document")
            yield Document(line, (text,) * len(reading.keys), repaired)
        except _FaultError as fault:
            yield Rejected(chunk.path, line, fault.kind, fault.detail)


def _paragraphs(chunk: Chunk) -> Iterator[tuple[int, bytes]]:
    """(line, content) of what stands between blank lines."""
    content, line, start = chunk.content, chunk.first_line, 0
    ends = [(found.start(), found.end()) for found in _BLANK_LINE.finditer(content)]
    for stop, following in [*ends, (len(content), len(content))]:
        leading = _LEADING_BLANK_LINES.match(content, start, stop)
        assert leading is not None, "the pattern matches nothing too"
        if body := content[leading.end() : stop].strip(b"\r\n"):
            yield line + content.count(b"\n", start, leading.end()), body
        line += content.count(b"\n", start, following)
        start = following


def _lines(chunk: Chunk) -> Iterator[tuple[int, bytes]]:
    """(number, content) of the lines that are not blank."""
    for number, line in enumerate(chunk.content.split(b"\n"), chunk.first_line):
        if line and not line.isspace():
            yield number, line.removesuffix(b"\r")


_PARTS: dict[str, Callable[[Chunk], Iterable[tuple[int, bytes]]]] = {
    "blank-lines": _paragraphs,
    "line": _lines,
    "file": lambda chunk: [(chunk.first_line, chunk.content)],
}
"""Value of `Reading.text_documents` to (line, content) of the documents of a chunk."""


def table_documents(chunk: Chunk, reading: Reading) -> Iterator[Found]:
    """The texts of the keys of each row."""
    assert chunk.columns is not None, "made by parquet.chunks"
    for row, values in enumerate(zip(*chunk.columns, strict=True), chunk.first_line):
        try:
            document = _document(row, values, reading)
        except _FaultError as fault:
            yield Rejected(chunk.path, row, fault.kind, fault.detail)
            continue
        if max(map(len, document.texts)) > reading.max_line_bytes:
            yield _too_long(chunk.path, row, reading)
        else:
            yield document


def _table_chunks(path: str, stream: IO[bytes], reading: Reading) -> Iterator[Chunk]:
    """The chunks of a whole table, which is read by seeking, so not from the stream."""
    with open(path, "rb", buffering=0) as raw:
        yield from table_chunks(path, raw, reading, 0, None)


def table_chunks(
    path: str, stream: IO[bytes], reading: Reading, first_group: int, stop_group: int | None
) -> Iterator[Chunk]:
    """The rows of the row groups first_group .. stop_group - 1 of a Parquet file, about CHUNK_BYTES at a time."""
    row = 1
    for columns in parquet.batches(path, stream, reading.keys, first_group, stop_group, CHUNK_BYTES):
        yield Chunk(path, row, len(columns[0]), columns=columns)
        row += len(columns[0])


_JSON_LINES = Format(line_chunks, json_documents, splits_at_lines=True)

FORMATS = {
    ".jsonl": _JSON_LINES,
    ".ndjson": _JSON_LINES,
    ".json": _JSON_LINES,
    ".txt": Format(text_chunks, text_documents),
    ".parquet": Format(_table_chunks, table_documents, is_table=True),
}
"""File name ending (before the compression's) to format."""


def format_of(path: str) -> Format:
    """The format that the name of a file tells, in capitals or not; standard input ("-") is JSON lines.

    Raises:
        DataError: an ending that is not known.
    """
    if path == STDIN:
        return _JSON_LINES
    suffixes = Path(path.lower()).suffixes
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    name = "".join(suffixes[:-1][-1:] if compressed else suffixes[-1:])
    if name not in FORMATS or (compressed and FORMATS[name].is_table):
        raise DataError(
            f"cannot tell the format of {path} from its name; it must end in {', '.join(FORMATS)}, "
            f"or these (not .parquet) with {' or '.join(COMPRESSIONS)}"
        )
    return FORMATS[name]
