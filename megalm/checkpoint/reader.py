"""Reading a checkpoint: verify, then any part of any tensor, whatever layout wrote it."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megalm.checkpoint.format import Manifest
from megalm.checkpoint.schema import FileEntry, SliceEntry
from megalm.config.model import ModelConfig
from megalm.distributed.shards import Box, ShardSpec
from megalm.errors import CheckpointError
from megalm.storage.durable import sha256_of
from megalm.storage.faults import reading

_HASHERS = 4
"""Files of a checkpoint that are hashed at one time: it is slower than reading them, and lets other threads run."""


def problems_of(folder: Path, manifest: Manifest, *, verify: bool) -> list[str]:
    """What is wrong with the files of a checkpoint; their content is read, several at a time, with `verify` only.

    Raises:
        CheckpointError: the system does not let them be read.
    """
    with ThreadPoolExecutor(_HASHERS) as hashers:
        found = hashers.map(lambda item: _problems(folder, *item, verify=verify), manifest.files.items())
        return [problem for problems in found for problem in problems]


def _problems(folder: Path, name: str, entry: FileEntry, *, verify: bool) -> list[str]:
    path = folder / name
    with reading(folder, CheckpointError, "load another step, or give this process the right to read it"):
        if not path.is_file():
            return [f"{name} is missing"]
        if path.stat().st_size != entry["bytes"]:
            return [f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}"]
        if verify and sha256_of(path) != entry["sha256"]:
            return [f"{name} has another SHA-256 than was written"]
    return []


class CheckpointReader:
    """A verified checkpoint.

    Raises:
        CheckpointError: a file is missing or cannot be read, has another size or another hash than the manifest says;
            all at once.
    """

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self._shards: dict[str, Any] = {}
        self.refuse(problems_of(folder, self.manifest, verify=verify))

    def refuse(self, problems: list[str]) -> None:
        """Raise what is wrong with the files, if anything is.

        Raises:
            CheckpointError: something is.
        """
        if problems:
            raise CheckpointError(
                f"{self.folder} is damaged: {'; '.join(problems)}; load another step or restore the files from a copy"
            )

    def problems(self, name: str, *, verify: bool) -> list[str]:
        """What is wrong with one file; its content is read with `verify` only.

        Raises:
            CheckpointError: the system does not let it be read.
        """
        return _problems(self.folder, name, self.manifest.files[name], verify=verify)

    def files_of(self, wanted: Mapping[str, ShardSpec]) -> set[str]:
        """The files that hold something of these parts of global tensors."""
        return {
            piece["file"]
            for name, spec in wanted.items()
            if name in self.names and self.shape(name) == spec.shape
            for piece in self.manifest.tensors[name]["slices"]
            if spec.box.intersection(Box(tuple(piece["offsets"]), tuple(piece["sizes"]))).numel
        }

    @property
    def model_config(self) -> ModelConfig:
        """The model's settings."""
        return self.manifest.section("model", ModelConfig)

    @property
    def names(self) -> set[str]:
        """Names of the parameters."""
        return {name for name, tensor in self.manifest.tensors.items() if "weight" in tensor["kinds"]}

    @property
    def memory(self) -> dict[str, tuple[int, ...]]:
        """The shapes, by name, of what the rows of the batch remember (segment recurrence)."""
        return {name: self.shape(name) for name, tensor in self.manifest.tensors.items() if "memory" in tensor["kinds"]}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a global tensor."""
        return tuple(self.manifest.tensors[name]["shape"])

    def kinds(self, name: str) -> list[str]:
        """What is kept of a global tensor: "weight" and what its optimizer had."""
        return self.manifest.tensors[name]["kinds"]

    @property
    def has_optimizer_state(self) -> bool:
        """Whether there is more than weights."""
        return any(kind != "weight" for name in self.names for kind in self.kinds(name))

    def read(
        self,
        name: str,
        kind: str,
        box: Box | None = None,
        start: int = 0,
        stop: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Elements start..stop of a box of a global tensor laid flat, as `dtype` (default: all of the whole tensor).

        Raises:
            CheckpointError: no shard holds some of them.
        """
        box = Box.whole(self.shape(name)) if box is None else box
        stop = box.numel if stop is None else stop
        result = torch.empty(stop - start, dtype=dtype)
        filled = 0
        for offset, wanted in box.of_range(start, stop):
            target = result[offset : offset + wanted.numel].view(wanted.sizes)
            for piece in self.manifest.tensors[name]["slices"]:
                filled += self._fill(target, wanted, piece, f"{kind}/{name}")
        if filled != stop - start:
            raise CheckpointError(f"{self.folder} lacks {stop - start - filled} elements of {kind} {name}")
        return result

    def _fill(self, target: torch.Tensor, wanted: Box, piece: SliceEntry, key: str) -> int:
        """Copy what a stored slice has of the box `wanted` into `target`; the number of elements."""
        filled = 0
        stored_box = Box(tuple(piece["offsets"]), tuple(piece["sizes"]))
        for offset, held in stored_box.of_range(piece["start"], piece["stop"]):
            common = wanted.intersection(held)
            if common.numel == 0:
                continue
            first, last = (offset + position for position in held.span(common))
            stored = self._stored(piece, key)[first:last]
            target[common.index(wanted)].copy_(stored.as_strided(common.sizes, held.strides))
            filled += common.numel
        return filled

    def _stored(self, piece: SliceEntry, key: str) -> Any:
        """What a shard, opened once, holds under `key`: it must be what the manifest says."""
        name, path = piece["file"], self.folder / piece["file"]
        try:
            with reading(path, CheckpointError, "load another step, or restore the file from a copy"):
                if name not in self._shards:
                    self._shards[name] = safe_open(path, framework="pt")
                stored = self._shards[name].get_slice(key)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged ({error}); load another step") from error
        found, wanted = (stored.get_dtype(), stored.get_shape()), ("F32", [piece["stop"] - piece["start"]])
        if found != wanted:
            raise CheckpointError(
                f"{path} is damaged: {key} is {found[0]} {found[1]}, not {wanted[0]} {wanted[1]}; load another step"
            )
        return stored

    def read_tensor(self, name: str, kind: str = "weight", dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A whole global tensor in its shape, as `dtype`."""
        return self.read(name, kind, dtype=dtype).view(self.shape(name))
