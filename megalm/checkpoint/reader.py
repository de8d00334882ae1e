"""Reading a checkpoint: verify, then any part of any tensor, whatever layout wrote it."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megalm.checkpoint.format import Manifest
from megalm.distributed.shards import Box
from megalm.errors import CheckpointError
from megalm.storage.durable import sha256_of

_VOCABULARY = ("embedding.tokens.weight", "head.weight")


class CheckpointReader:
    """A verified checkpoint.

    Raises:
        CheckpointError: a file is missing, has another size or another hash than the manifest says; all at once.
    """

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self._shards: dict[str, Any] = {}
        problems = self._problems(verify)
        if problems:
            raise CheckpointError(
                f"{folder} is damaged: {'; '.join(problems)}; load another step or restore the files from a copy"
            )

    def _problems(self, verify: bool) -> list[str]:
        found = []
        for name, entry in self.manifest.files.items():
            path = self.folder / name
            if Path(name).name != name:
                found.append(f"{name!r} is no plain file name")
            elif not path.is_file():
                found.append(f"{name} is missing")
            elif path.stat().st_size != entry["bytes"]:
                found.append(f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}")
            elif verify and sha256_of(path) != entry["sha256"]:
                found.append(f"{name} has another SHA-256 than was written")
        return found

    @property
    def names(self) -> set[str]:
        """Names of the global tensors."""
        return set(self.manifest.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a global tensor."""
        return tuple(self.manifest.tensors[name]["shape"])

    def kinds(self, name: str) -> set[str]:
        """What the checkpoint holds of a global tensor: "weight", and the optimizer's state, as "exp_avg"."""
        return set(self.manifest.tensors[name]["slices"])

    @property
    def has_optimizer_state(self) -> bool:
        """Whether it was written with the optimizer's state."""
        return any(self.kinds(name) != {"weight"} for name in self.names)

    def fits(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a global tensor has this shape, the vocabulary padding of old checkpoints aside."""
        stored = self.shape(name)
        padded = self.manifest.format == 1 and stored[1:] == shape[1:] and stored[0] > shape[0]
        return stored == shape or (padded and name in _VOCABULARY)

    def read(
        self, name: str, kind: str, part: Box | None = None, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Elements start..stop of a part of a global tensor laid flat, fp32 (default: all of the whole tensor).

        Raises:
            CheckpointError: no shard holds some of them.
        """
        part = Box.whole(self.shape(name)) if part is None else part
        stop = part.size if stop is None else stop
        result = torch.empty(stop - start)
        filled = 0
        for offset, wanted in part.of_range(start, stop):
            target = result[offset : offset + wanted.size].view(wanted.height, wanted.width)
            for piece in self.manifest.tensors[name]["slices"][kind]:
                filled += self._fill(target, wanted, piece, f"{kind}/{name}")
        if filled != stop - start:
            raise CheckpointError(f"{self.folder} lacks {stop - start - filled} elements of {kind} {name}")
        return result

    def _fill(self, target: torch.Tensor, wanted: Box, piece: dict[str, Any], key: str) -> int:
        """Copy what a stored slice has of the rectangle `wanted` into `target`; the number of elements."""
        stored_part = Box.whole(self.shape(key.partition("/")[2]))
        if "rows" in piece:
            stored_part = Box(tuple(piece["rows"]), tuple(piece["columns"]))
        filled = 0
        for offset, held in stored_part.of_range(piece["start"], piece["stop"]):
            common = wanted.intersection(held)
            if common.size == 0:
                continue
            first = offset + (common.rows[0] - held.rows[0]) * held.width
            stored = self._shard(piece["file"]).get_slice(key)[first : first + common.height * held.width]
            rows = stored.view(common.height, held.width)
            target[_within(common.rows, wanted.rows), _within(common.columns, wanted.columns)] = rows[
                :, _within(common.columns, held.columns)
            ]
            filled += common.size
        return filled

    def _shard(self, name: str) -> Any:
        """An open shard; opened once, since every tensor may have a part in it."""
        if name not in self._shards:
            self._shards[name] = safe_open(self.folder / name, framework="pt")
        return self._shards[name]

    def read_tensor(self, name: str, kind: str = "weight") -> torch.Tensor:
        """A whole global tensor in its shape, fp32."""
        return self.read(name, kind).view(self.shape(name))


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> slice:
    """A range as a slice of the range in which it lies."""
    return slice(inner[0] - outer[0], inner[1] - outer[0])
