"""From a checkpoint to a model folder of transformers, tensor by tensor."""

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from megalm.checkpoint.hugging_face.folder import CONFIG, INDEX, WEIGHTS, read_json
from megalm.checkpoint.hugging_face.importing import ORIGIN, TOKENIZER_FILES
from megalm.checkpoint.hugging_face.tensors import Correspondence, in_shards
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.streaming import write_tensors
from megalm.config.hugging_face import architecture_of, write_settings
from megalm.config.spans import SequenceIds
from megalm.errors import CheckpointError
from megalm.models.contract import Part
from megalm.models.families import FAMILIES
from megalm.storage.atomic import atomic_folder
from megalm.storage.durable import replace_text
from megalm.storage.faults import writing

SHARD_BYTES = 5_000_000_000
"""transformers' own limit of a file."""
GENERATION = "generation_config.json"


def export_model(
    reader: CheckpointReader,
    target: Path,
    *,
    dtype: str | None = None,
    architecture: str | None = None,
    special_ids: Mapping[str, int] = MappingProxyType({}),
    files: Mapping[str, bytes] = MappingProxyType({}),
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write the model of a checkpoint into the new folder `target`; the class of transformers that it is of.

    `dtype` defaults to that of the model that the run began as, or that the run computed in. `special_ids` has the
    tokenizer's ids by name ("bos", "eod", "pad"), `files` its files. In memory are no more than two tensors, with the
    parts that one is made of.

    Raises:
        ConfigError: no class of transformers holds this model. CheckpointError: `target` exists or cannot be written.
    """
    origin = reader.manifest.states.get("hugging_face", {})
    architecture = architecture or origin.get("architecture")
    whole = reader.model_config
    part = FAMILIES[whole.model_family].part(whole, architecture)
    config = part.config
    architecture = architecture or architecture_of(config)
    dtype = dtype or origin.get("dtype") or _dtype_of_run(reader)
    if target.exists():
        raise CheckpointError(f"{target} exists; give a new folder")
    with writing(target, CheckpointError, "free some space or choose another folder"), atomic_folder(target) as new:
        own = Correspondence.of(config, architecture)
        read = partial(_tensor, reader, own, part, getattr(torch, dtype))
        _write_weights(read, own, new, getattr(torch, dtype), shard_bytes)
        small = reader.folder.parent / ORIGIN
        ids = _sequence_ids(special_ids) if config.encoder_decoder else _ids(special_ids)
        # a class may say positions by its padding token
        values = {**_kept(small / CONFIG), **ids, **write_settings(architecture, config)}
        _write_json(new / CONFIG, {**values, "dtype": dtype, "torch_dtype": dtype})
        if not config.is_encoder:
            _write_json(new / GENERATION, _kept(small / GENERATION) or ids)
        for name, content in (_kept_tokenizer(small) or files).items():
            (new / name).write_bytes(content)
    return architecture


def _write_weights(
    read: Callable[[str], torch.Tensor], own: Correspondence, folder: Path, dtype: torch.dtype, shard_bytes: int
) -> None:
    """One file, or several and their index."""
    sizes = {name: dtype.itemsize * math.prod(own.shape(name)) for name in sorted(own.tensors)}
    shards = list(in_shards(sizes, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shapes = {name: own.shape(name) for name in names}
        write_tensors(folder / file, shapes, dtype, read, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def _tensor(reader: CheckpointReader, own: Correspondence, part: Part, dtype: torch.dtype, name: str) -> torch.Tensor:
    tensor = own.tensors[name]
    return tensor.layout.join([reader.read_tensor(part.name_in_whole(ours), dtype=dtype) for ours in tensor.ours])


def _dtype_of_run(reader: CheckpointReader) -> str:
    precision: dict[str, Any] = reader.manifest.config.get("engine", {})
    return "bfloat16" if precision.get("bf16") else "float16" if precision.get("fp16") else "float32"


def _kept(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _kept_tokenizer(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}


def _ids(special_ids: Mapping[str, int]) -> dict[str, int]:
    keys = {"bos": "bos_token_id", "eod": "eos_token_id", "pad": "pad_token_id"}
    return {key: special_ids[name] for name, key in keys.items() if name in special_ids}


def _sequence_ids(special_ids: Mapping[str, int]) -> dict[str, int]:
    """Those of an encoder-decoder, as span corruption trains it; none without a tokenizer."""
    if not special_ids:
        return {}
    ids = SequenceIds.of(special_ids)
    return {"decoder_start_token_id": ids.start, "eos_token_id": ids.end, "pad_token_id": ids.pad}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    replace_text(path, json.dumps(values, indent=2) + "\n")
