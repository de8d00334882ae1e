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
What the rows of the batch remember of the samples before (segment recurrence) are tensors of the kind "memory" alone,
one a layer: [data-parallel ranks, micro-batches, rows of one, positions, width] of the layout that wrote it.
`states` holds, by name, what else outlives a step (`continuation.Stateful`). Earlier formats: `upgrade`.
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from megalm import __version__
from megalm.checkpoint.schema import FileEntry, TensorEntry, check_contents
from megalm.checkpoint.upgrade import upgraded
from megalm.errors import CheckpointError
from megalm.storage.documents import Count, DocumentError, PlainName, parse_json, validated
from megalm.storage.faults import reading

T = TypeVar("T")

FORMAT = 3
MANIFEST = "manifest.json"
LATEST = "latest"
_STEP_FOLDER = re.compile(r"step_([0-9]{1,18})")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a checkpoint but the tensors' values."""

    step: Count
    layout: str
    config: dict[str, dict[str, Any]]
    identity: dict[str, Any]
    states: dict[str, dict[str, Any]]
    files: dict[PlainName, FileEntry]
    tensors: dict[str, TensorEntry]
    format: int = FORMAT
    megalm: str = __version__

    def to_json(self) -> str:
        """The text of manifest.json."""
        values = asdict(self)
        return json.dumps({"sha256": _digest(values), **values}, indent=1) + "\n"

    def section(self, name: str, schema: type[T]) -> T:
        """A section of the configuration of the run that wrote it.

        Raises:
            CheckpointError: it is not there, or not what this version knows under that name.
        """
        try:
            return validated(schema, self.config.get(name))
        except DocumentError as error:
            raise CheckpointError(
                f"the {name} settings in the manifest of step {self.step} are none of this megalm {__version__} "
                f"({error}); it was written by megalm {self.megalm}"
            ) from error

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a checkpoint folder, of this format or an earlier one.

        Raises:
            CheckpointError: it is missing, unreadable, damaged, of a newer format, or of another step than its folder.
        """
        path = folder / MANIFEST
        try:
            with reading(path, CheckpointError, "load another step, or give this process the right to read it"):
                content = path.read_bytes() if os.path.lexists(path) else None
            if content is None:
                raise CheckpointError(f"{folder} is no complete checkpoint: it has no {MANIFEST}; load another step")
            manifest = _checked(parse_json(content), path)
            check_contents(manifest.files, manifest.tensors)
        except DocumentError as error:
            raise CheckpointError(f"{path} is damaged ({error}); load another step") from error
        named = _STEP_FOLDER.fullmatch(folder.name)
        if named and int(named[1]) != manifest.step:
            raise CheckpointError(
                f"{path} is that of step {manifest.step}, not of the step that its folder names; load the folder under "
                f"its own name, step_{manifest.step}"
            )
        return manifest


def _checked(values: Any, path: Path) -> Manifest:
    """The manifest of a parsed file, of whatever format.

    Raises:
        CheckpointError: it is of a newer format.
        DocumentError: it is not what was written, or no manifest.
    """
    if not isinstance(values, dict) or type(values.get("format")) is not int:
        raise DocumentError("it is no manifest: it says no format")
    if values["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {values['format']}, written by megalm {values.get('megalm')}; this megalm "
            f"{__version__} reads up to format {FORMAT}: upgrade megalm"
        )
    if values.pop("sha256", None) != _digest(values):
        raise DocumentError("it has another SHA-256 than was written")
    if values["format"] != FORMAT:
        try:
            values = upgraded(values)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise DocumentError(f"it is no manifest of format {values['format']}: {error!r}") from error
    return validated(Manifest, values)


def _digest(values: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content, so that a flipped digit in it does not pass for a value."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return run / f"step_{step}"


def steps_of(run: Path) -> list[int]:
    """Steps of the complete checkpoints in a run folder, ascending; none where there is no folder.

    Raises:
        OSError: the folder cannot be read.
    """
    names = os.listdir(run) if run.is_dir() else []
    found = (_STEP_FOLDER.fullmatch(name) for name in names if (run / name / MANIFEST).is_file())
    return sorted(int(match[1]) for match in found if match)


def find_checkpoint(path: Path, way_out: str = "give --fresh to start over") -> Path | None:
    """The checkpoint that `path` (a run folder or a step folder) offers: its own, or the one that `latest` names.

    None if there is none at all. `way_out` is what an error offers besides a repair.

    Raises:
        CheckpointError: it cannot be read, or there are checkpoints but `latest` is missing or wrong, so that a start
            from scratch would silently waste them.
    """
    with reading(path, CheckpointError, "give this process the right to read it, or another folder"):
        return _found(path, way_out)


def name_of_latest(run: Path) -> str | None:
    """What `latest` of a run folder names, whether that is there or not; None without such a file.

    Raises:
        OSError: it cannot be read.
    """
    path = run / LATEST
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return stream.read(100).decode(errors="replace").strip()


def _found(path: Path, way_out: str) -> Path | None:
    if (path / MANIFEST).is_file():
        return path
    pointer, name = path / LATEST, name_of_latest(path)
    steps = steps_of(path)
    if name is None:
        if not steps:
            return None
        raise CheckpointError(
            f"{path} holds checkpoints ({_names(steps)}) but no file `{LATEST}`; write the one to continue into it "
            f"(`echo step_{steps[-1]} > {pointer}`), or {way_out}"
        )
    if not _STEP_FOLDER.fullmatch(name) or not (path / name / MANIFEST).is_file():
        raise CheckpointError(
            f"{pointer} names {name!r}, which is no complete checkpoint here (there are: {_names(steps)}); "
            f"correct it, or {way_out}"
        )
    return path / name


def _names(steps: list[int]) -> str:
    return ", ".join(f"step_{step}" for step in steps) or "none"
