"""What a sink is, and what it is told of the run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Sink(Protocol):
    """A place where metrics go; it exists on rank 0 only."""

    cadence: "Cadence"

    def row(self, step: int, values: Mapping[str, Any]) -> None:
        """One training step that is due, or one evaluation; the keys are those of `monitor.names`."""

    def text(self, name: str, text: str, step: int) -> None:
        """Text: "config" (the run's settings, before the first row) or "sample" (what the model writes)."""

    def close(self) -> None:
        """Write what is still queued."""


@dataclass(frozen=True)
class Cadence:
    """Which training steps a sink gets. Evaluations always go to every sink."""

    interval: int
    at_ends: bool = False
    """The first and the last step of this start too."""


EVERY_STEP = Cadence(1)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a sink may want to know of the run."""

    folder: Path | None
    """The run folder, if there is one."""
    resume_step: int
    resume_samples: int
    total_iters: int
