"""From a checkpoint of any layout into the live state of this one."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from megalm.checkpoint.reader import CheckpointReader
from megalm.distributed.shards import ShardSpec, StateSlice
from megalm.errors import CheckpointError


def restore_weights(
    reader: CheckpointReader,
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
        if name in reader.names and not reader.fits(name, shard_specs[name].shape)
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{reader.folder} is of another model: {'; '.join(problems[:5])}{more}; use the model settings of the run "
            "that wrote it (its config.yaml)"
        )
    for name, parameter in parameters.items():
        set_weight(parameter, reader.read(name, "weight", shard_specs[name].part))


def restore_slices(reader: CheckpointReader, slices: Sequence[StateSlice], *, with_moments: bool) -> None:
    """Fill this rank's fp32 weights, and the optimizer's state if asked.

    Raises:
        CheckpointError: state is asked for that the checkpoint does not hold.
    """
    with torch.no_grad():
        for piece in slices:
            views = piece.tensors(with_moments)
            _check_kinds(reader, piece.name, set(views))
            for kind, view in views.items():
                view.copy_(reader.read(piece.name, kind, piece.shard_spec.part, piece.start, piece.stop))


def _check_kinds(reader: CheckpointReader, name: str, kinds: set[str]) -> None:
    """The checkpoint holds what is asked for of a tensor."""
    if not reader.has_optimizer_state and kinds != {"weight"}:
        raise CheckpointError(
            f"{reader.folder} holds no optimizer state (--no-save-optim); give --no-load-optim or --finetune to start "
            "the optimizer anew"
        )
    if kinds - reader.kinds(name):
        raise CheckpointError(
            f"{reader.folder} holds {', '.join(sorted(reader.kinds(name)))} of {name}, not "
            f"{', '.join(sorted(kinds - reader.kinds(name)))}: another --optimizer wrote it; go on with that one, or "
            "give --load with --no-load-optim or --finetune to start this one anew"
        )
