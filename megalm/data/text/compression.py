"""Compressed input: a file name ending stands for what decompresses a stream."""

import gzip
import io
from collections.abc import Callable
from typing import IO, Any, cast

from megalm.errors import PlatformError

_ZSTD_INPUT_BYTES = 1 << 14
"""Read at a time: what it decompresses to is held at once."""


def _open_zstd(stream: IO[bytes]) -> IO[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise PlatformError(
            "reading .zst needs the package zstandard; `pip install zstandard`, or unpack the file"
        ) from error
    return cast(IO[bytes], _CompleteZstd(zstandard.ZstdDecompressor(max_window_size=1 << 31), stream))


class _CompleteZstd(io.RawIOBase):
    """The content of all frames of a zstd stream; a frame that is cut off is an EOFError, never a short file."""

    def __init__(self, decompressor: Any, source: IO[bytes]) -> None:
        super().__init__()
        self._decompressor, self._source = decompressor, source
        self._frame: Any = None
        self._held, self._input = b"", b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, all of them except at the end."""
        pieces, missing = [], size
        while missing > 0 and (self._held or self._fill()):
            piece, self._held = self._held[:missing], self._held[missing:]
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)

    def _fill(self) -> bool:
        """Decompresses more; False at the end of the last frame."""
        while not self._held:
            if not self._input:
                self._input = self._source.read(_ZSTD_INPUT_BYTES)
                if not self._input:
                    if self._frame is not None:
                        raise EOFError("it ends within a zstd frame")
                    return False
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._held, self._input = self._frame.decompress(self._input), b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        return True


COMPRESSIONS: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    ".gz": lambda stream: cast(IO[bytes], gzip.GzipFile(fileobj=stream, mode="rb")),
    ".zst": _open_zstd,
}
"""File name ending to what decompresses a stream."""
