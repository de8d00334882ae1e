"""Writing a checkpoint. Phases: shard, compare (every rank), commit (rank 0)."""

import functools
import itertools
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megalm.checkpoint.catalogue import BEST_BY, values_of
from megalm.checkpoint.format import LATEST, MANIFEST, Manifest, step_folder, steps_of
from megalm.checkpoint.retention import Retention
from megalm.checkpoint.schema import FileEntry, TensorEntry
from megalm.distributed.collectives import gather_json, on_all_ranks
from megalm.distributed.fingerprint import is_finite, of_slices
from megalm.distributed.shards import StateSlice
from megalm.errors import CheckpointError, NonFiniteError, WrongStateError
from megalm.storage.durable import open_new, replace_text, sha256_of, sync_file, sync_folder
from megalm.storage.faults import reason_of, system_fault, writing

log = logging.getLogger("megalm")

_ADVICE = "mend the folder, free some space there, or choose another --save"


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
        CheckpointError: a rank could not write; nothing incomplete is left behind and `latest` is as before.
        WrongStateError: what is written are not the model's weights; the same holds.
        NonFiniteError: weights or optimizer state are not finite; the same holds.
    """
    final = step_folder(run, header["step"])
    is_main = dist.get_rank() == 0
    name = on_all_ranks(device, lambda: new_folder(run, final).name if is_main else "")
    partial = run / gather_json(name, device)[0]
    try:
        entry = on_all_ranks(device, lambda: _write_shard(partial, slices, with_moments))
        written = on_all_ranks(device, lambda: _written(partial / entry["file"], slices, dtype))
        wrong = differing(written)
        on_all_ranks(device, lambda: _refuse(final, wrong))
        entries = gather_json(entry, device)
        on_all_ranks(device, lambda: _commit(partial, final, header, entries) if is_main else None)
    except BaseException:
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _bytes_of(slices: Sequence[StateSlice], with_moments: bool) -> int:
    return sum(tensor.numel() * 4 for piece in slices for tensor in piece.tensors(with_moments).values())


def new_folder(run: Path, final: Path) -> Path:
    """An empty folder for the shards; what killed saves have left is removed."""
    for pattern in (".step_*.partial", ".step_*.removed"):
        for left in run.glob(pattern):
            discard(left)
    partial = _free_name(run, f".{final.name}", ".partial")
    with writing(partial, CheckpointError, _ADVICE):
        partial.mkdir(parents=True)
    return partial


def _free_name(run: Path, name: str, suffix: str) -> Path:
    """`name` + `suffix`, with a number between them where that name is taken by what cannot be removed."""
    numbers = ("", *(f".{number}" for number in range(1, 10_000)))
    return next(path for number in numbers if not os.path.lexists(path := run / f"{name}{number}{suffix}"))


def discard(folder: Path) -> None:
    """Remove a folder that is not wanted any more, as far as that is possible; what goes wrong is said once a run."""
    try:
        shutil.rmtree(folder if folder.name.startswith(".") else _set_aside(folder))
    except OSError as error:
        _warn_once(folder.parent, error)


def _warn_once(run: Path, error: OSError) -> None:
    """House-keeping that fails is said once for each reason."""
    if next(_failures(run, error.errno)) == 0:
        where = error.filename or run
        log.warning("%s: old checkpoints take up space and cannot be removed: %s", where, reason_of(error, where))


@functools.cache
def _failures(run: Path, number: int | None) -> Iterator[int]:
    """Counts how often something in a run folder could not be removed for the same reason."""
    return itertools.count()


def _set_aside(folder: Path) -> Path:
    """A checkpoint is renamed before it is removed, so that none is ever half there; its new name."""
    doomed = _free_name(folder.parent, f".{folder.name}", ".removed")
    os.rename(folder, doomed)
    return doomed


def _write_shard(partial: Path, slices: Sequence[StateSlice], with_moments: bool) -> dict[str, Any]:
    """This rank's file, and what the manifest says of it."""
    path = partial / f"rank_{dist.get_rank():05d}.safetensors"
    given = [
        (f"{kind}/{piece.name}", tensor.detach().cpu().contiguous())
        for piece in slices
        for kind, tensor in piece.tensors(with_moments).items()
    ]
    tensors = dict(given)
    assert len(tensors) == len(given), (
        f"{path.name} would hold {len(tensors)} of {len(given)} slices: one for each tensor"
    )
    _check_finite(partial.name.removeprefix(".").partition(".")[0], tensors)
    advice = f"it needs {_bytes_of(slices, with_moments) / 1e6:.1f} MB: free some space or choose another --save"
    with writing(path, CheckpointError, advice):
        with open_new(path) as stream:
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
        try:
            save_file(tensors, path)
        except SafetensorError as error:  # it puts the system's error into words
            raise system_fault(error) or CheckpointError(f"cannot write {path}: {error}; {advice}") from error
        path.chmod(mode)  # by the umask; safetensors makes files that only their owner can read
        sync_file(path)
        written = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return {**written, "slices": [_described(piece, path.name, with_moments) for piece in slices]}


def _written(path: Path, slices: Sequence[StateSlice], dtype: torch.dtype) -> dict[str, int]:
    """Fingerprints of the weights in this rank's file."""
    with safe_open(path, framework="pt") as shard:
        weights = [piece for piece in slices if "weight" in piece.tensors()]
        return of_slices(((piece, shard.get_tensor(f"weight/{piece.name}")) for piece in weights), dtype)


def _refuse(final: Path, wrong: Sequence[str]) -> None:
    if wrong:
        raise WrongStateError(
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
    files: dict[str, FileEntry] = {}
    tensors: dict[str, TensorEntry] = {}
    for rank, entry in enumerate(entries):
        files[entry["file"]] = {"bytes": entry["bytes"], "sha256": entry["sha256"], "rank": rank}
        for piece in entry["slices"]:
            shape, kinds = piece["tensor"]["shape"], piece["tensor"]["kinds"]
            tensor = tensors.setdefault(piece["name"], {"shape": shape, "kinds": kinds, "slices": []})
            tensor["slices"].append(piece["slice"])
    with writing(final, CheckpointError, _ADVICE):
        replace_text(partial / MANIFEST, Manifest(**header, files=files, tensors=tensors).to_json())
        replaced = _set_aside(final) if final.exists() else None  # the same step of an earlier, diverged attempt
        try:
            os.rename(partial, final)
        except OSError:
            if replaced is not None:
                os.rename(replaced, final)
            raise
        sync_folder(final.parent)
    name_latest(final.parent, header["step"])
    if replaced is not None:
        discard(replaced)


def name_latest(run: Path, step: int) -> None:
    """Let the run go on from the checkpoint of `step`.

    Raises:
        CheckpointError: the run folder cannot be written.
    """
    with writing(run, CheckpointError, _ADVICE):
        replace_text(run / LATEST, step_folder(run, step).name + "\n")


def prune_checkpoints(run: Path, saved: int, retention: Retention) -> None:
    """Remove the checkpoints up to the step `saved` that no rule wants.

    Later ones stay, left by an attempt that this run has turned back from. What cannot be removed stays, with a
    warning: it is house-keeping, and no reason to lose a run.
    """
    try:
        steps = [step for step in steps_of(run) if step <= saved]
        kept = retention.kept(steps, values_of(run, BEST_BY) if retention.best is not None else {})
    except OSError as error:
        _warn_once(run, error)
        return
    for step in steps:
        if step not in kept:
            discard(step_folder(run, step))
