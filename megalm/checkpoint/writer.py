"""Writing a checkpoint. Phases: shard (every rank), manifest (rank 0), commit (rank 0), prune (rank 0)."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megalm.checkpoint.format import LATEST, MANIFEST, Manifest, step_folder, steps_of
from megalm.distributed.collectives import gather_json, on_all_ranks
from megalm.distributed.shards import StateSlice
from megalm.errors import CheckpointError
from megalm.storage.durable import replace_text, sha256_of, sync_file, sync_folder


def save_checkpoint(
    run: Path,
    slices: Sequence[StateSlice],
    *,
    header: dict[str, Any],
    with_moments: bool,
    keep: int | None,
    device: torch.device,
) -> Path:
    """Write `step_N` into the run folder; every rank calls it with the slices that it alone is to write.

    `header` holds the Manifest's fields but `files` and `tensors`. Only after every rank's shard is on disk does the
    folder get its final name, and only then does `latest` name it. This checkpoint and the `keep` - 1 before it stay;
    so do later ones, left by an attempt that this run has turned back from.

    Raises:
        CheckpointError: a rank could not write; nothing incomplete is left behind and `latest` is as before.
    """
    final = step_folder(run, header["step"])
    partial = final.with_name(f".{final.name}.partial")
    on_all_ranks(device, lambda: _new_folder(run, partial) if dist.get_rank() == 0 else None)
    try:
        entry = on_all_ranks(device, lambda: _write_shard(partial, slices, with_moments))
        entries = gather_json(entry, device)
        on_all_ranks(device, lambda: _commit(partial, final, header, entries) if dist.get_rank() == 0 else None)
    except BaseException:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if keep is not None:
        on_all_ranks(device, lambda: _prune(run, header["step"], keep) if dist.get_rank() == 0 else None)
    return final


def _new_folder(run: Path, partial: Path) -> None:
    """An empty `partial`; what killed saves have left is removed."""
    with _or_checkpoint_error(partial):
        for pattern in (".step_*.partial", ".step_*.removed"):
            for left in run.glob(pattern):
                shutil.rmtree(left)
        partial.mkdir(parents=True)


@contextlib.contextmanager
def _or_checkpoint_error(path: Path) -> Iterator[None]:
    """The operating system's refusal to write `path` as a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}; mend the folder or choose another --save") from error


def _write_shard(partial: Path, slices: Sequence[StateSlice], with_moments: bool) -> dict[str, Any]:
    """This rank's file, and what the manifest says of it."""
    path = partial / f"rank_{dist.get_rank():05d}.safetensors"
    tensors = {
        f"{kind}/{piece.name}": tensor.detach().cpu().contiguous()
        for piece in slices
        for kind, tensor in piece.tensors(with_moments).items()
    }
    try:
        save_file(tensors, path)
        sync_file(path)
        written = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    except Exception as error:  # safetensors has its own error type for a full disk
        free = shutil.disk_usage(partial).free if partial.exists() else 0
        needed = sum(tensor.nbytes for tensor in tensors.values())
        raise CheckpointError(
            f"cannot write {path} ({error}): it needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free; "
            "free some space or choose another --save"
        ) from error
    return {**written, "slices": [_described(piece, with_moments) for piece in slices]}


def _described(piece: StateSlice, with_moments: bool) -> dict[str, Any]:
    """What the manifest says of a slice, and of the tensor that it is of."""
    shard_spec = piece.shard_spec
    where = {"rows": list(shard_spec.part.rows), "columns": list(shard_spec.part.columns)}
    kinds = list(piece.tensors(with_moments))
    described = {"name": piece.name, "shape": list(shard_spec.shape), "kinds": kinds, **where}
    return {**described, "start": piece.start, "stop": piece.stop}


def _commit(partial: Path, final: Path, header: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Manifest, then the folder's final name, then `latest`: each durable before the next begins."""
    files: dict[str, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}
    for rank, entry in enumerate(entries):
        files[entry["file"]] = {"bytes": entry["bytes"], "sha256": entry["sha256"], "rank": rank}
        for piece in entry["slices"]:
            slices: dict[str, list[Any]] = {kind: [] for kind in piece["kinds"]}
            tensor = tensors.setdefault(piece["name"], {"shape": piece["shape"], "slices": slices})
            for pieces in tensor["slices"].values():
                where = {key: piece[key] for key in ("rows", "columns", "start", "stop")}
                pieces.append({"file": entry["file"], **where})
    with _or_checkpoint_error(final):
        replace_text(partial / MANIFEST, Manifest(**header, files=files, tensors=tensors).to_json())
        if final.exists():  # the same step of an earlier, diverged attempt
            _remove(final)
        os.rename(partial, final)
        sync_folder(final.parent)
        replace_text(final.parent / LATEST, final.name + "\n")


def _prune(run: Path, saved: int, keep: int) -> None:
    """Remove the oldest checkpoints, so that `keep` are left up to the step just saved."""
    with _or_checkpoint_error(run):
        for step in [step for step in steps_of(run) if step <= saved][:-keep]:
            _remove(step_folder(run, step))


def _remove(folder: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that none is ever half there."""
    doomed = folder.with_name(f".{folder.name}.removed")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)
