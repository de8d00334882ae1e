"""Progress of a long command over input of known size: one line that is rewritten on a terminal, lines elsewhere."""

import sys
import time
from typing import TextIO

_BAR_WIDTH = 20


class Progress:
    """Prints rate and time left as input is consumed.

    Args:
        total_bytes: size of all input on disk.
        every_documents: print after this many documents; None prints by time (0.5 s on a terminal, else 10 s).
    """

    def __init__(self, total_bytes: int, every_documents: int | None = None, stream: TextIO | None = None) -> None:
        self._total_bytes, self._every = total_bytes, every_documents
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._interval_s = 0.5 if self._is_terminal else 10.0
        self._start = self._last_time = time.monotonic()
        self._last_documents = 0
        self._width = 0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def update(self, input_bytes: int, text_bytes: int, documents: int, tokens: int) -> None:
        """Notes the totals so far and prints them when it is time."""
        now = time.monotonic()
        if self._every is None:
            due = now - self._last_time >= self._interval_s
        else:
            due = documents // self._every > self._last_documents // self._every
        if due:
            self._last_time, self._last_documents = now, documents
            self._print(self.line(input_bytes, text_bytes, documents, tokens))

    def line(self, input_bytes: int, text_bytes: int, documents: int, tokens: int) -> str:
        """The progress so far as text."""
        elapsed = max(self.elapsed_s, 1e-9)
        share = min(1.0, input_bytes / self._total_bytes) if self._total_bytes else 1.0
        left = f"{elapsed * (1 - share) / share:.0f} s left" if share > 0 else "time left unknown"
        filled = round(share * _BAR_WIDTH)
        bar = f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}]" if self._is_terminal else ""
        return (
            f"{bar}{share:6.1%} | {documents:,} documents | {tokens:,} tokens | "
            f"{text_bytes / 1e6 / elapsed:.1f} MB/s | {documents / elapsed:,.0f} documents/s | {left}"
        )

    def close(self) -> None:
        """Ends the line on a terminal, so that what comes next starts on its own."""
        if self._is_terminal and self._width:
            self._stream.write("\n")

    def _print(self, line: str) -> None:
        if self._is_terminal:
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()
