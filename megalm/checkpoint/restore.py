"""From a checkpoint of any layout into the live state of this one."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from megalm.checkpoint.hugging_face import HuggingFaceReader
from megalm.checkpoint.reader import CheckpointReader
from megalm.distributed.shards import ShardSpec, StateSlice
from megalm.errors import CheckpointError

Weights = CheckpointReader | HuggingFaceReader


def restore_weights(
    reader: Weights,
    parameters: dict[str, nn.Parameter],
    shard_specs: Mapping[str, ShardSpec],
    set_weight: Callable[[nn.Parameter, torch.Tensor], None],
) -> None:
    """Give this rank's `parameters` their working copies; `shard_specs` are those of the whole model's parameters.

    Raises:
        CheckpointError: names or shapes differ from the checkpoint's, all of them listed.
    """
    problems = [f"{name} is not in the checkpoint" for name in shard_specs if name not in reader.names]
    problems += [f"{name} is only in the checkpoint" for name in sorted(reader.names - set(shard_specs))]
    problems += [
        f"{name} is {reader.shape(name)} in the checkpoint, {shard_specs[name].shape} here"
        for name in shard_specs
        if name in reader.names and reader.shape(name) != shard_specs[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{reader.folder} is of another model: {'; '.join(problems[:5])}{more}; use the model settings of the run "
            "that wrote it (its config.yaml)"
        )
    for name, parameter in parameters.items():
        set_weight(parameter, reader.read(name, "weight", shard_specs[name].box))


def restore_slices(reader: Weights, slices: Sequence[StateSlice], *, with_moments: bool) -> None:
    """Fill this rank's fp32 weights, and what its optimizer keeps of them if asked.

    Raises:
        CheckpointError: moments are asked for, and the checkpoint was written with --no-save-optim or by another
            optimizer.
    """
    with torch.no_grad():
        for piece in slices:
            if with_moments:
                _check_kinds(reader, piece)
            for kind, view in piece.tensors(with_moments).items():
                view.copy_(reader.read(piece.name, kind, piece.shard_spec.box, piece.start, piece.stop))


def _check_kinds(reader: Weights, piece: StateSlice) -> None:
    stored, wanted = reader.kinds(piece.name), list(piece.tensors())
    if set(stored) == set(wanted):
        return
    if not reader.has_optimizer_state:
        raise CheckpointError(
            f"{reader.folder} holds no optimizer state (--no-save-optim); give --no-load-optim or "
            "--finetune to start the optimizer anew"
        )
    raise CheckpointError(
        f"{reader.folder} holds {', '.join(stored)} of {piece.name}, and this run's optimizer keeps "
        f"{', '.join(wanted)}; use the optimizer of the run that wrote it, or start anew from its weights: another "
        "--save, and --load with --no-load-optim"
    )
