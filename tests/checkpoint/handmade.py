"""Checkpoints of two small tensors, without an engine; functions for the ranks of `run_on_ranks`."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalm.checkpoint.retention import Retention
from megalm.checkpoint.writer import prune_checkpoints, save_checkpoint
from megalm.distributed.collectives import on_all_ranks
from megalm.distributed.shards import ShardSpec, StateSlice

TENSORS = {"a.weight": torch.arange(15.0).view(3, 5), "b.bias": torch.arange(4.0) - 9}
MOMENTS = ("exp_avg", "exp_avg_sq")
CPU = torch.device("cpu")
UNCOMPARED: dict[str, Any] = {"differing": lambda written: [], "dtype": torch.float32, "device": CPU}
"""There is no model to compare with."""


def value(name: str, kind: str, step: int) -> torch.Tensor:
    """A whole tensor of the checkpoint of `step`, laid flat."""
    return TENSORS[name].flatten() + {"weight": 0.0, "exp_avg": 100.0, "exp_avg_sq": 200.0}[kind] + step


def slices(step: int) -> list[StateSlice]:
    """This rank's equal share of every tensor."""
    rank, world = dist.get_rank(), dist.get_world_size()
    pieces = []
    for name, tensor in TENSORS.items():
        start, stop = (tensor.numel() * number // world for number in (rank, rank + 1))
        weight, *moments = (value(name, kind, step)[start:stop] for kind in ("weight", *MOMENTS))
        pieces.append(
            StateSlice(
                name,
                ShardSpec.of_whole(tuple(tensor.shape)),
                start,
                stop,
                weight,
                dict(zip(MOMENTS, moments, strict=True)),
            )
        )
    return pieces


def save(run: Path, step: int, *, keep: int | None = None, with_moments: bool = True) -> Path:
    header: dict[str, Any] = {
        "step": step,
        "layout": "world 2",
        "config": {"model": {"num_layers": 1}, "optimizer": {"lr": 0.1}, "training": {"seed": 7}},
        "identity": {"tokenizer": "aaaabbbbccccdddd"},
        "states": {"progress": {"step": step, "consumed_samples": 8 * step}, "optimizer": {"optimizer_steps": step}},
    }
    saved = save_checkpoint(run, slices(step), header=header, with_moments=with_moments, **UNCOMPARED)
    if keep is not None:
        on_all_ranks(CPU, lambda: prune_checkpoints(run, step, Retention(last=keep)) if dist.get_rank() == 0 else None)
    return saved


def names(folder: Path) -> list[str]:
    """What lies in a folder."""
    return sorted(path.name for path in folder.iterdir())
