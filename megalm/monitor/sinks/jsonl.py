"""metrics.jsonl: one JSON object for each logged step and each evaluation."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalm.config.output import LoggingConfig
from megalm.monitor.sinks.base import EVERY_STEP, Cadence, RunFacts
from megalm.storage.documents import DocumentError, parse_json
from megalm.storage.durable import replace_text


class JsonlSink:
    """Appends rows to a run's metrics.jsonl; rows after the step that a run resumes from are dropped first."""

    def __init__(self, path: Path, *, resume_step: int, cadence: Cadence = EVERY_STEP) -> None:
        self.path, self.cadence = path, cadence
        if path.is_file():  # a device has no rows, and may have no end
            rows = [row for row in read_metrics(path) if row["step"] <= resume_step]
            replace_text(path, "".join(_line(row) for row in rows))
        self._stream = open(path, "ab", buffering=0)  # noqa: SIM115

    @classmethod
    def build(cls, config: LoggingConfig, facts: RunFacts) -> "JsonlSink | None":
        """The sink of a run with a folder."""
        if facts.folder is None:
            return None
        cadence = Cadence(config.log_interval, at_ends=True)
        return cls(facts.folder / "metrics.jsonl", resume_step=facts.resume_step, cadence=cadence)

    def row(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one row; it is in the file when this returns, or nothing of it.

        Raises:
            OSError: the disk is full, or gone.
        """
        line = _line(values).encode()
        size = os.fstat(self._stream.fileno()).st_size
        try:
            while line:
                line = line[self._stream.write(line) :]
        except OSError as error:
            os.ftruncate(self._stream.fileno(), size)
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def text(self, name: str, text: str, step: int) -> None:
        """Nothing: the file holds numbers."""

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _line(row: Mapping[str, Any]) -> str:
    """One row as strict JSON: what is not finite is null."""
    finite = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; what follows a line that a kill cut short, or that is no row, is left out.

    Raises:
        OSError: it cannot be read.
    """
    rows: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines():
        try:
            row = parse_json(line)
        except DocumentError:
            break
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            break
        rows.append(row)
    return rows
