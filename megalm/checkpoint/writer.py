"""Writing a checkpoint. Phases: shard, compare (every rank), commit (rank 0)."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from megalm.checkpoint.format import LATEST, MANIFEST, Manifest, step_folder, steps_of
from megalm.distributed.collectives import gather_json, on_all_ranks
from megalm.distributed.fingerprint import is_finite, of_slices
from megalm.distributed.shards import StateSlice
from megalm.errors import CheckpointError, NonFiniteError
from megalm.storage.durable import replace_text, sha256_of, sync_file, sync_folder


def save_checkpoint(
    run: Path,
    slices: Sequence[StateSlice],
    *,
    header: dict[str, Any],
    with_moments: bool,
    differing: Callable[[Mapping[str, int]], list[str]],
    dtype: torch.dtype,
    device: torch.device,
) -> Path:
    """Write `step_N` into the run folder; every rank calls it with the slices that it alone is to write.

    What is on disk is compared with the model before it counts: `differing` gets the fingerprints of the weights that
    this rank has written, as a model of type `dtype` computes with them, and names those that the model has otherwise.

    `header` holds the Manifest's fields but `files` and `tensors`. Only after every rank's shard is on disk does the
    folder get its final name, and only then does `latest` name it. Earlier checkpoints stay (`prune_checkpoints`).

    Raises:
        CheckpointError: a rank could not write, or what is written are not the model's weights; nothing incomplete is
            left behind and `latest` is as before.
        NonFiniteError: weights or optimizer state are not finite; the same holds.
    """
    final = step_folder(run, header["step"])
    partial = final.with_name(f".{final.name}.partial")
    on_all_ranks(device, lambda: _new_folder(run, partial) if dist.get_rank() == 0 else None)
    try:
        entry = on_all_ranks(device, lambda: _write_shard(partial, slices, with_moments))
        written = on_all_ranks(device, lambda: _written(partial / entry["file"], slices, dtype))
        wrong = differing(written)
        on_all_ranks(device, lambda: _refuse(final, wrong))
        entries = gather_json(entry, device)
        on_all_ranks(device, lambda: _commit(partial, final, header, entries) if dist.get_rank() == 0 else None)
    except BaseException:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
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
    _check_finite(partial.name.removeprefix(".").removesuffix(".partial"), tensors)
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
    return {**written, "slices": [_described(piece, path.name, with_moments) for piece in slices]}


def _written(path: Path, slices: Sequence[StateSlice], dtype: torch.dtype) -> dict[str, int]:
    """Fingerprints of the weights in this rank's file."""
    with safe_open(path, framework="pt") as shard:
        return of_slices(((piece, shard.get_tensor(f"weight/{piece.name}")) for piece in slices), dtype)


def _refuse(final: Path, wrong: Sequence[str]) -> None:
    if wrong:
        raise CheckpointError(
            f"{final} is not published: it would hold other weights than the model computes with (of {wrong[0]}"
            f"{f' and {len(wrong) - 1} more' if len(wrong) > 1 else ''}); this is a fault of megalm or of an option of "
            "DeepSpeed: take options out of the DeepSpeed JSON, or use another --zero-stage"
        )


def _check_finite(final: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises:
    NonFiniteError: some of them are not.
    """
    bad = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if bad:
        kind, _, name = bad[0].partition("/")
        more = f" and of {len(bad) - 1} more" if len(bad) > 1 else ""
        raise NonFiniteError(
            f"{final} is not published: {kind} of {name}{more} is not finite; lower --lr and run the same command "
            "again: it continues from the last checkpoint"
        )


def _described(piece: StateSlice, file: str, with_moments: bool) -> dict[str, Any]:
    """What the manifest says of a slice, and of the tensor that it is of."""
    shard_spec = piece.shard_spec
    return {
        "name": piece.name,
        "tensor": {"shape": shard_spec.shape, "kinds": list(piece.tensors(with_moments))},
        "slice": {"file": file, **asdict(shard_spec.box), "start": piece.start, "stop": piece.stop},
    }


def _commit(partial: Path, final: Path, header: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Manifest, then the folder's final name, then `latest`: each durable before the next begins."""
    files: dict[str, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}
    for rank, entry in enumerate(entries):
        files[entry["file"]] = {"bytes": entry["bytes"], "sha256": entry["sha256"], "rank": rank}
        for piece in entry["slices"]:
            tensor = tensors.setdefault(piece["name"], {**piece["tensor"], "slices": []})
            tensor["slices"].append(piece["slice"])
    with _or_checkpoint_error(final):
        replace_text(partial / MANIFEST, Manifest(**header, files=files, tensors=tensors).to_json())
        if final.exists():  # the same step of an earlier, diverged attempt
            _remove(final)
        os.rename(partial, final)
        sync_folder(final.parent)
        name_latest(final.parent, header["step"])


def name_latest(run: Path, step: int) -> None:
    """Let the run go on from the checkpoint of `step`."""
    replace_text(run / LATEST, step_folder(run, step).name + "\n")


def prune_checkpoints(run: Path, saved: int, keep: int) -> None:
    """Remove the oldest checkpoints, so that `keep` are left up to the step `saved`.

    Later ones stay, left by an attempt that this run has turned back from.
    """
    with _or_checkpoint_error(run):
        for step in [step for step in steps_of(run) if step <= saved][:-keep]:
            _remove(step_folder(run, step))


def _remove(folder: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that none is ever half there."""
    doomed = folder.with_name(f".{folder.name}.removed")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)
