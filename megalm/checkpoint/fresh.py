"""--fresh is a command to one start: the same command again goes on with the run that it began.

RUN/fresh.json holds which command began the run, and whether the run stopped to be continued by it. A run that failed
or is complete is begun anew; so is one that another command began.
"""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from megalm.config.sections import RunConfig
from megalm.storage.documents import parse_json
from megalm.storage.durable import replace_text

FRESH = "fresh.json"


def command_of(config: RunConfig) -> str:
    """What tells a command from others: the hash of its settings."""
    return hashlib.sha256(json.dumps(config.kept(), sort_keys=True).encode()).hexdigest()


def without_done_commands(config: RunConfig, restart: int) -> tuple[RunConfig, list[str]]:
    """The run as this start is to take it, and what to say: --fresh is not done twice for one command.

    `restart`: how often the launcher has started this job before.
    """
    checkpoint = config.checkpoint
    if not checkpoint.fresh or checkpoint.save is None:
        return config, []
    begun = _read(Path(checkpoint.save))
    if begun.get("command") != command_of(config) or not (begun.get("stopped") or restart):
        return config, []
    note = (
        f"--fresh was done when this command began the run in {checkpoint.save}: it goes on; to begin once more, move "
        "that folder away"
    )
    return config.model_copy(update={"checkpoint": checkpoint.model_copy(update={"fresh": False})}), [note]


def note_fresh(run: Path, command: str) -> None:
    """A run is begun by `command`, with --fresh."""
    replace_text(run / FRESH, json.dumps({"command": command, "stopped": False}) + "\n")


def note_stopped(run: Path, stopped: bool) -> None:
    """The run has stopped to be continued, or goes on; nothing is noted of a run without --fresh."""
    begun = _read(run)
    if begun and begun.get("stopped") is not stopped:
        replace_text(run / FRESH, json.dumps(begun | {"stopped": stopped}) + "\n")


def _read(run: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        content = parse_json((run / FRESH).read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}
