"""metrics.jsonl: one JSON object for each logged step and each evaluation."""

import json
from pathlib import Path
from typing import Any

from megalm.files import replace_text


class MetricsFile:
    """Appends rows to a run's metrics.jsonl; rows after the step that a run resumes from are dropped first."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        self.path = path
        if path.exists():
            rows = [row for row in read_metrics(path) if row["step"] <= resume_step]
            replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._stream = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; it is in the file when this returns."""
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
