"""The weights that the model computes with, compared with the fp32 slices that a checkpoint holds of them.

Both are the engine's, but on ways of their own: the model's are in its parameters, the slices are where the optimizer
of a ZeRO stage is believed to keep them. An option of DeepSpeed that lays them out otherwise shows here.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalm.distributed.fingerprint import MODULUS, fingerprint
from megalm.distributed.groups import RankGroup
from megalm.distributed.shards import ShardSpec


def differing(
    held: Mapping[str, int],
    names: Mapping[nn.Parameter, str],
    shard_specs: Mapping[str, ShardSpec],
    ranks: RankGroup | None,
) -> list[str]:
    """The parameters of this rank whose weights in the model have another fingerprint than their slices.

    `held` are those of this rank's slices. `ranks` have the slices of a parameter together (None: each rank has all);
    they call it together.
    """
    slices = _summed([held.get(name, 0) for name in names.values()], ranks)
    parts = _summed([_of_part(parameter, shard_specs[name].box.numel) for parameter, name in names.items()], ranks)
    return [
        name
        for (parameter, name), expected, part in zip(names.items(), slices, parts, strict=True)
        if expected != (part if _is_spread(parameter) else _of_whole(parameter, shard_specs[name].box.numel))
        or (_is_gathered(parameter) and expected != _of_whole(parameter, shard_specs[name].box.numel))
    ]


def _is_spread(parameter: Any) -> bool:
    """Whether ZeRO-3 has left this rank a part of the parameter."""
    return hasattr(parameter, "ds_tensor")


def _is_gathered(parameter: Any) -> bool:
    """Whether ZeRO-3 keeps all of it at hand, as it does with small ones."""
    return _is_spread(parameter) and parameter.numel() == parameter.ds_numel


def _of_whole(parameter: Any, numel: int) -> int:
    return fingerprint(parameter.detach().reshape(-1)[:numel])


def _of_part(parameter: Any, numel: int) -> int:
    """Fingerprint of the part of a parameter that ZeRO-3 has left this rank; what lies beyond `numel` is padding."""
    if not _is_spread(parameter):
        return 0
    own = parameter.ds_tensor
    start = dist.get_rank(parameter.ds_process_group) * own.ds_numel
    return fingerprint(own.detach().view(-1)[: max(0, min(own.ds_numel, numel - start))], start)


def _summed(values: list[int], ranks: RankGroup | None) -> list[int]:
    """The sums over the ranks."""
    if ranks is None or ranks.size == 1:
        return values
    total: Tensor = torch.tensor(values, dtype=torch.int64, device=_device(ranks))
    dist.all_reduce(total, group=ranks.group)
    return [value % MODULUS for value in total.tolist()]


def _device(ranks: RankGroup) -> torch.device:
    return torch.device("cuda" if dist.get_backend(ranks.group) == "nccl" else "cpu")
