"""The manifest of a checkpoint: what `step_N/manifest.json` holds.

    {"sha256": (of the rest), "format": 3, "megalm": "0.1.0", "step": 20, "layout": "world 2 = ...",
     "config": {...}, "identity": {"tokenizer": ...},
     "states": {"progress": {"step": 20, "consumed_samples": 320, ...}, "optimizer": {...}, "order": {...}},
     "files": {"rank_00000.safetensors": {"bytes": ..., "sha256": ..., "rank": 0}, ...},
     "tensors": {"layers.0.mlp.w_up.weight": {
         "shape": [64, 16], "kinds": ["weight", "exp_avg", "exp_avg_sq"], "slices": [
             {"file": "rank_00000.safetensors", "offsets": [0, 0], "sizes": [32, 16], "start": 0, "stop": 512}, ...]}}}

A slice is elements start..stop (row-major) of the box of the tensor that has `sizes` elements from `offsets` on, in
every dim. Its file holds it once for each kind, that is the weight and whatever the optimizer keeps of this tensor:
one-dimensional, fp32, under the key `<kind>/<name>`. Shapes are those of the whole model without vocabulary padding.
`states` holds, by name, what else outlives a step (`continuation.Stateful`). Earlier formats: `upgrade`.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megalm import __version__
from megalm.checkpoint.upgrade import upgraded
from megalm.errors import CheckpointError

FORMAT = 3
MANIFEST = "manifest.json"
LATEST = "latest"
_STEP_FOLDER = re.compile(r"step_(\d+)")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a checkpoint but the tensors' values."""

    step: int
    layout: str
    config: dict[str, Any]
    identity: dict[str, Any]
    states: dict[str, dict[str, Any]]
    files: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, Any]]
    format: int = FORMAT
    megalm: str = __version__

    def to_json(self) -> str:
        """The text of manifest.json."""
        values = asdict(self)
        return json.dumps({"sha256": _digest(values), **values}, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a checkpoint folder, of this format or an earlier one.

        Raises:
            CheckpointError: it is missing, unreadable, or of a newer format.
        """
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] > FORMAT:
                raise CheckpointError(
                    f"{path} has format {values['format']}, written by megalm {values['megalm']}; this megalm "
                    f"{__version__} reads up to format {FORMAT}: upgrade megalm"
                )
            if values.pop("sha256") != _digest(values):
                raise ValueError("another SHA-256 than was written")
            return cls(**(values if values["format"] == FORMAT else upgraded(values)))
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder} is no complete checkpoint: it has no {MANIFEST}; load another step"
            ) from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path} is damaged ({error!r}); load another step") from error


def _digest(values: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content, so that a flipped digit in it does not pass for a value."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return run / f"step_{step}"


def steps_of(run: Path) -> list[int]:
    """Steps of the complete checkpoints in a run folder, ascending."""
    found = (_STEP_FOLDER.fullmatch(path.parent.name) for path in run.glob(f"step_*/{MANIFEST}"))
    return sorted(int(match[1]) for match in found if match)


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint that `path` (a run folder or a step folder) offers: its own, or the one that `latest` names.

    None if there is none at all.

    Raises:
        CheckpointError: there are checkpoints but `latest` is missing or wrong, so that a start from scratch would
            silently waste them.
    """
    if (path / MANIFEST).is_file():
        return path
    pointer = path / LATEST
    steps = steps_of(path)
    if not pointer.is_file():
        if not steps:
            return None
        raise CheckpointError(
            f"{path} holds checkpoints ({_names(steps)}) but no file `{LATEST}`; write the one to continue into it "
            f"(`echo step_{steps[-1]} > {pointer}`), or give --fresh to start over"
        )
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    if not _STEP_FOLDER.fullmatch(name) or not (path / name / MANIFEST).is_file():
        raise CheckpointError(
            f"{pointer} names {name!r}, which is no complete checkpoint here (there are: {_names(steps)}); "
            "correct it, or give --fresh to start over"
        )
    return path / name


def _names(steps: list[int]) -> str:
    return ", ".join(f"step_{step}" for step in steps) or "none"
