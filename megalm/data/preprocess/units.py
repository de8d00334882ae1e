"""The input cut into work units: which part of which file a worker turns into one shard.

Where the cuts lie follows from the files alone, not from the number of workers, so that a shard that is finished
fits the next run too. A unit says by its `source` what it is made from.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO, cast

from megalm.data.text import parquet
from megalm.data.text.formats import Chunk, LineRange, Reading, format_of, table_chunks
from megalm.data.text.input_file import InputFile, damage_named

MIN_UNIT_BYTES = 1 << 21
MAX_UNIT_BYTES = 1 << 25
UNITS_PER_FILE = 64


@dataclass(frozen=True)
class Segment:
    """A part of a file."""

    path: str
    start: int = 0
    """First byte, or first row group."""
    stop: int = 0
    chunks: tuple[Chunk, ...] | None = None
    """The part itself, of a file that cannot be read from the middle (compressed, a stream)."""

    def read(self, reading: Reading) -> Iterator[Chunk]:
        """The chunks of this part, with lines numbered from its start."""
        if self.chunks is not None:
            yield from self.chunks
            return
        with damage_named(self.path), open(self.path, "rb", buffering=0) as raw:
            form = format_of(self.path)
            if form.is_table:
                yield from table_chunks(self.path, raw, reading, self.start, self.stop)
            else:
                lines = cast(IO[bytes], LineRange(raw, self.start, self.stop))
                yield from form.chunks(self.path, lines, reading)


@dataclass(frozen=True)
class Unit:
    """Work for one worker."""

    number: int
    segments: tuple[Segment, ...]
    source: str
    """Digest of what the unit is made from."""
    input_bytes: int
    """What it takes of the size of all input, for the progress."""


def unit_bytes(file_bytes: int) -> int:
    """Size of a unit of a file: a power of two, so that small files are shared out too and large ones in few pieces."""
    wanted = max(1, file_bytes // UNITS_PER_FILE)
    return min(MAX_UNIT_BYTES, max(MIN_UNIT_BYTES, 1 << (wanted - 1).bit_length()))


class Planner:
    """Cuts files into units, in order; reads what cannot be read from the middle itself.

    `sha256` has the digests of the files that the planner has read to the end.
    """

    def __init__(self, files: list[InputFile], reading: Reading, spec_digest: str) -> None:
        self._files, self._reading, self._spec_digest = files, reading, spec_digest
        self.sha256: dict[str, str] = {}
        self._segments: list[Segment] = []
        self._sources: list[str] = []
        self._text_bytes = self._input_bytes = 0
        self._number = 0

    def units(self) -> Iterator[Unit]:
        """All units."""
        for file in self._files:
            identity = f"{file.path}\0{file.size}\0{file.modified_ns}" if file.is_regular else None
            for segment, text_bytes, input_bytes in self._segments_of(file):
                self._segments.append(segment)
                self._sources.append(_source_of(segment, identity))
                self._text_bytes += text_bytes
                self._input_bytes += input_bytes
                if self._text_bytes >= MIN_UNIT_BYTES:
                    yield self._packed()
        if self._segments:
            yield self._packed()

    def _segments_of(self, file: InputFile) -> Iterator[tuple[Segment, int, int]]:
        """(segment, bytes of its text, bytes of its input) of one file."""
        if file.format.is_table:
            with damage_named(file.path), open(file.path, "rb", buffering=0) as raw:
                groups = parquet.num_row_groups(file.path, raw)
            for number, size in enumerate(groups):
                yield Segment(file.path, number, number + 1), size, file.size // len(groups)
        elif file.is_regular and file.compression is None and file.format.splits_at_lines:
            step = unit_bytes(file.size)
            for start in range(0, file.size, step):
                stop = min(file.size, start + step)
                yield Segment(file.path, start, stop), stop - start, stop - start
        else:
            yield from self._streamed(file)

    def _streamed(self, file: InputFile) -> Iterator[tuple[Segment, int, int]]:
        chunks: list[Chunk] = []
        first_line, size, position, number = 1, 0, 0, 0
        for chunk in file.chunks(self._reading):
            # Lines count from the start of the segment.
            chunks.append(replace(chunk, first_line=chunk.first_line - first_line + 1))
            size += len(chunk.content)
            if size >= MIN_UNIT_BYTES:
                first_line = chunk.first_line + chunk.num_lines
                yield Segment(file.path, number, number + 1, tuple(chunks)), size, file.bytes_read - position
                chunks, size, position, number = [], 0, file.bytes_read, number + 1
        if chunks:
            yield Segment(file.path, number, number + 1, tuple(chunks)), size, file.bytes_read - position
        self.sha256[file.path] = file.sha256

    def _packed(self) -> Unit:
        source = hashlib.sha256("\0".join([self._spec_digest, *self._sources]).encode()).hexdigest()
        unit = Unit(self._number, tuple(self._segments), source, self._input_bytes)
        self._segments, self._sources, self._text_bytes, self._input_bytes = [], [], 0, 0
        self._number += 1
        return unit


def _source_of(segment: Segment, identity: str | None) -> str:
    """What a segment is made from: a part of a file as it is now, or, of a stream, its content."""
    if identity is not None:
        return f"{identity}\0{segment.start}\0{segment.stop}"
    digest = hashlib.sha256()
    for chunk in segment.chunks or ():
        digest.update(b"%d %d " % (chunk.num_lines, len(chunk.content)))
        digest.update(chunk.content)
    return digest.hexdigest()
