"""Reading a model folder of transformers as a checkpoint: any part of any of our tensors, from its safetensors."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megalm.checkpoint.hugging_face.pickled import PickledTensors
from megalm.checkpoint.hugging_face.tensors import Correspondence
from megalm.config.hugging_face import read_folder
from megalm.distributed.shards import Box
from megalm.errors import CheckpointError
from megalm.models.foreign import Index
from megalm.storage.documents import DocumentError, parse_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_PICKLE, _PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_MOST_NAMED = 5
_RENAMED = {"gamma": "weight", "beta": "bias"}
"""What tensors of norms were called when BERT was published."""


class HuggingFaceReader:
    """The weights of a folder that transformers wrote; read as a `CheckpointReader` is, and there are no moments.

    With `allow_pickle` those in torch's files serve where the folder has no safetensors.

    Raises:
        CheckpointError: no such folder, a broken file, or missing, unknown or misshapen tensors, all of them listed.
        ConfigError: config.json is of another class, or has settings that megalm's models lack.
    """

    has_optimizer_state = False

    def __init__(self, folder: Path, *, allow_pickle: bool = False) -> None:
        self.folder = folder
        self._index, self._weights = self._choose_files(allow_pickle)
        self.values = read_json(folder / CONFIG)
        self.architecture, self.model_config = read_folder(self.values, folder)
        self._own = Correspondence.of(self.model_config, self.architecture)
        self._files: dict[str, Any] = {}
        self._file_of = self._find_tensors()
        self._check()
        self._holders = {own: name for name, tensor in self._own.tensors.items() for own in tensor.ours}

    @property
    def names(self) -> set[str]:
        """Names of our tensors."""
        return set(self._own.shapes)

    @property
    def dtype(self) -> str:
        """The type that most of the weights are stored in, as transformers calls it ("bfloat16")."""
        name = max(self._own.tensors, key=lambda name: torch.Size(self._own.shape(name)).numel())
        first = self._slice(name)[tuple(slice(0, 0) for _ in self._own.shape(name))]
        return str(first.dtype).removeprefix("torch.")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one of our tensors."""
        return self._own.shapes[name]

    def kinds(self, name: str) -> list[str]:
        """What is kept of one of our tensors."""
        return ["weight"]

    def read(
        self, name: str, kind: str = "weight", box: Box | None = None, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Elements start..stop of a box of one of our tensors laid flat, fp32 (default: all of the whole tensor)."""
        assert kind == "weight", "transformers keeps no optimizer state"
        box = Box.whole(self.shape(name)) if box is None else box
        stop = box.numel if stop is None else stop
        result = torch.empty(stop - start)
        for offset, wanted in box.of_range(start, stop):
            result[offset : offset + wanted.numel] = self._part(name, wanted.index()).reshape(-1)
        return result

    def read_tensor(self, name: str, kind: str = "weight") -> torch.Tensor:
        """One of our tensors in its shape, fp32."""
        return self.read(name, kind).view(self.shape(name))

    def _part(self, name: str, index: Index) -> torch.Tensor:
        tensor = self._own.tensors[self._holders[name]]
        shapes = [self._own.shapes[own] for own in tensor.ours]
        stored = self._slice(tensor.name)
        return tensor.layout.read(lambda part: stored[part], tensor.ours.index(name), shapes, index)

    def _slice(self, name: str) -> Any:
        file, stored_name = self._file_of[name]
        return self._open(file).get_slice(stored_name)

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.folder / file
            if self._weights == _PICKLE:
                self._files[file] = PickledTensors(path)
                return self._files[file]
            try:
                self._files[file] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}; copy it anew") from error
        return self._files[file]

    def _choose_files(self, allow_pickle: bool) -> tuple[str, str]:
        """Names of the index of several files and of a single one: safetensors where the folder has them."""
        has = {name for name in (WEIGHTS, INDEX, _PICKLE, _PICKLE_INDEX) if (self.folder / name).is_file()}
        is_pickled = bool(has) and not has & {WEIGHTS, INDEX}
        if is_pickled and not allow_pickle:
            name = _PICKLE if _PICKLE in has else _PICKLE_INDEX
            raise CheckpointError(
                f"{self.folder} has its weights as a pickle ({name}), which can run code when it is read; where you "
                "trust it, give megalm convert from-hf --allow-pickle, which takes nothing but tensors out of it; or "
                "save them as safetensors: in transformers, "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            )
        return (_PICKLE_INDEX, _PICKLE) if is_pickled else (INDEX, WEIGHTS)

    def _find_tensors(self) -> dict[str, tuple[str, str]]:
        """Name of transformers' tensor -> (file, name in the file), ignored ones left out."""
        index = self.folder / self._index
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(_is_file_name(file) for file in weight_map.values()):
                raise CheckpointError(f"{index} has no weight_map of plain file names; copy it anew")
            stored = {str(name): file for name, file in weight_map.items()}
        elif (self.folder / self._weights).is_file():
            stored = dict.fromkeys(self._open(self._weights).keys(), self._weights)
        else:
            raise CheckpointError(
                f"{self.folder} has neither {WEIGHTS} nor {INDEX}; give a folder that transformers' save_pretrained "
                "wrote"
            )
        return {self._full_name(name): (file, name) for name, file in stored.items() if not self._is_ignored(name)}

    def _full_name(self, name: str) -> str:
        """The name as the model with its head has it; files of the bare model lack the prefix."""
        name = re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda old: _RENAMED[old[0]], name)
        prefix = self._own.names.prefix + "."
        known = name in self._own.tensors or name.startswith(prefix)
        return name if known or prefix + name not in self._own.tensors else prefix + name

    def _is_ignored(self, name: str) -> bool:
        if self.model_config.tied and name == f"{self._own.names.head}.weight":
            return True  # a copy of the embedding
        return any(re.fullmatch(pattern, name) for pattern in self._own.names.ignored)

    def _check(self) -> None:
        expected = self._own.tensors
        problems = [f"{name} is missing" for name in expected if name not in self._file_of]
        problems += [f"{name} is unknown" for name in self._file_of if name not in expected]
        for name in set(expected) & set(self._file_of):
            file, stored = self._file_of[name]
            if stored not in set(self._open(file).keys()):
                problems.append(f"{name} is not in {file}")
            elif (found := tuple(self._slice(name).get_shape())) != self._own.shape(name):
                problems.append(f"{name} has shape {found}, not {self._own.shape(name)}")
        if problems:
            more = f" and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
            raise CheckpointError(
                f"{self.folder} does not hold the {self.architecture} of its {CONFIG}: "
                f"{'; '.join(problems[:_MOST_NAMED])}{more}"
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: it is missing, unreadable, or something else.
    """
    try:
        values = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist; give a folder that transformers' save_pretrained wrote"
        ) from None
    except (OSError, DocumentError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold an object, not {type(values).__name__}")
    return values


def _is_file_name(file: object) -> bool:
    return isinstance(file, str) and Path(file).name == file
