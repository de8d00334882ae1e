"""From a model folder of transformers to a run folder, tensor by tensor."""

import math
import shutil
from pathlib import Path

import torch

from megalm.checkpoint.format import LATEST, MANIFEST, Manifest, find_checkpoint, step_folder
from megalm.checkpoint.hugging_face.folder import CONFIG, HuggingFaceReader
from megalm.checkpoint.hugging_face.tensors import in_shards
from megalm.checkpoint.run_folder import prepare_run_folder
from megalm.checkpoint.schema import FileEntry, SliceEntry, TensorEntry
from megalm.checkpoint.streaming import write_tensors
from megalm.config.data import TokenizerConfig
from megalm.errors import CheckpointError
from megalm.storage.atomic import atomic_folder
from megalm.storage.durable import replace_text
from megalm.storage.faults import writing

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)
ORIGIN = "hugging_face"
"""Folder of a run with the small files of the model that it began as: config.json, tokenizer and others."""
_SHARD_BYTES = 1 << 30


def import_model(
    folder: Path, run: Path, shard_bytes: int = _SHARD_BYTES, *, allow_pickle: bool = False
) -> HuggingFaceReader:
    """Write the model of `folder` into the new run folder `run` as the checkpoint of step 0, fp32, without moments.

    In memory are no more than two tensors; files have at most `shard_bytes`, or one tensor.

    Raises:
        CheckpointError, ConfigError: as `HuggingFaceReader`; `run` holds a checkpoint, or cannot be written.
    """
    reader = HuggingFaceReader(folder, allow_pickle=allow_pickle)
    prepare_run_folder(run)
    if find_checkpoint(run) is not None:
        raise CheckpointError(f"--save {run} holds a checkpoint; choose a new folder")
    final = step_folder(run, 0)
    with writing(run, CheckpointError, "free some space or choose another --save"):
        with atomic_folder(final) as partial:
            files, tensors = _write_shards(reader, partial, shard_bytes)
            tokenizer = _copy_small_files(folder, run / ORIGIN)
            sections = {"model": reader.model_config, "tokenizer": tokenizer}
            manifest = Manifest(
                step=0,
                layout=f"from {reader.architecture}",
                config={name: section.model_dump(mode="json") for name, section in sections.items()},
                identity={},
                states={"hugging_face": {"architecture": reader.architecture, "dtype": reader.dtype}},
                files=files,
                tensors=tensors,
            )
            replace_text(partial / MANIFEST, manifest.to_json())
        replace_text(run / LATEST, final.name + "\n")
    return reader


def _write_shards(
    reader: HuggingFaceReader, partial: Path, shard_bytes: int
) -> tuple[dict[str, FileEntry], dict[str, TensorEntry]]:
    """The manifest's `files` and `tensors`."""
    files: dict[str, FileEntry] = {}
    tensors: dict[str, TensorEntry] = {}
    sizes = {name: 4 * math.prod(reader.shape(name)) for name in sorted(reader.names)}
    for number, names in enumerate(in_shards(sizes, shard_bytes)):
        path = partial / f"part_{number:05d}.safetensors"
        flat = {f"weight/{name}": (sizes[name] // 4,) for name in names}
        digest = write_tensors(path, flat, torch.float32, lambda key: reader.read(key.removeprefix("weight/")))
        files[path.name] = FileEntry(bytes=path.stat().st_size, sha256=digest, rank=0)
        for name in names:
            shape = list(reader.shape(name))
            piece = SliceEntry(file=path.name, offsets=[0] * len(shape), sizes=shape, start=0, stop=math.prod(shape))
            tensors[name] = TensorEntry(shape=shape, kinds=["weight"], slices=[piece])
    return files, tensors


def _copy_small_files(folder: Path, target: Path) -> TokenizerConfig:
    """Keep configuration and tokenizer in the run folder; the settings of that tokenizer, if there is one."""
    target.mkdir(exist_ok=True)
    for name in (CONFIG, "generation_config.json", *TOKENIZER_FILES):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    has_one = any((target / name).is_file() for name in TOKENIZER_FILES[:3])
    return TokenizerConfig(tokenizer_model=str(target.absolute()) if has_one else None)
