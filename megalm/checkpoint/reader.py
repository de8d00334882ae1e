"""Reading a checkpoint: verify, then any range of any tensor, whatever layout wrote it."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megalm.checkpoint.format import Manifest
from megalm.errors import CheckpointError
from megalm.files import sha256_of


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

    def has(self, kind: str) -> bool:
        """Whether the checkpoint holds "weight", "exp_avg" or "exp_avg_sq"."""
        return kind in self.manifest.scalars["kinds"]

    def read(self, name: str, kind: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements start..stop of a global tensor laid flat, fp32 (default: all of them).

        Raises:
            CheckpointError: no shard holds some of them.
        """
        entry = self.manifest.tensors[name]
        stop = int(torch.Size(entry["shape"]).numel()) if stop is None else stop
        result = torch.empty(stop - start)
        filled = 0
        for piece in entry["slices"][kind]:
            low, high = max(start, piece["start"]), min(stop, piece["stop"])
            if low >= high:
                continue
            stored = self._shard(piece["file"]).get_slice(f"{kind}/{name}")
            result[low - start : high - start] = stored[low - piece["start"] : high - piece["start"]]
            filled += high - low
        if filled != stop - start:
            raise CheckpointError(f"{self.folder} lacks {stop - start - filled} elements of {kind} {name}")
        return result

    def _shard(self, name: str) -> Any:
        """An open shard; opened once, since every tensor may have a part in it."""
        if name not in self._shards:
            self._shards[name] = safe_open(self.folder / name, framework="pt")
        return self._shards[name]

    def read_tensor(self, name: str, kind: str = "weight") -> torch.Tensor:
        """A whole global tensor in its shape, fp32."""
        return self.read(name, kind).view(self.shape(name))
