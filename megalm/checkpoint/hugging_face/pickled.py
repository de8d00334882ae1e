"""Weights in torch's own files, which are pickles: read only where the user allows it, and as tensors only."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.errors import CheckpointError
from megalm.models.foreign import Index
from megalm.storage.faults import reading


class PickledTensors:
    """The tensors of one file, told and read as safetensors' `safe_open` does.

    torch makes tensors of it and nothing else (`weights_only`): what would run code is refused. Files since torch 1.6
    are mapped into memory, older ones read whole.

    Raises:
        CheckpointError: the file cannot be read, or holds more than tensors by name.
    """

    def __init__(self, path: Path) -> None:
        advice = "copy it anew, or save the model as safetensors where it comes from"
        with reading(path, CheckpointError, advice):
            is_mapped = zipfile.is_zipfile(path)
            try:
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
            except OSError:
                raise
            except Exception as error:  # a broken or hostile pickle can make torch raise anything
                reason = str(error).strip().partition("\n")[0]
                raise CheckpointError(f"{path} cannot be read as tensors alone: {reason}; {advice}") from error
        if not isinstance(found, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
        ):
            raise CheckpointError(f"{path} must hold tensors by name and nothing else; {advice}")
        self._tensors: dict[str, Tensor] = found

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self._tensors)

    def get_slice(self, name: str) -> "_Slices":
        """What parts of a tensor are read from."""
        return _Slices(self._tensors[name])


class _Slices:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        """Shape of the whole tensor."""
        return list(self._tensor.shape)

    def __getitem__(self, index: Index) -> Any:
        return self._tensor[index]
