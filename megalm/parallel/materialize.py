"""Memory and initial values for a model that was cut on the meta device.

Each parameter is drawn whole, by name, and cut, so that values do not depend on the layout and no rank holds the whole.
"""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megalm.distributed.functional import all_reduce
from megalm.models.families import FAMILIES
from megalm.parallel.styles import Shards


@torch.no_grad()
def materialize(model: nn.Module, shards: Shards, seed: int, device: torch.device) -> None:
    """Give a model on the meta device memory on `device` and its initial values, which do not depend on the layout.

    Each parameter is drawn whole, by name, and cut.
    """
    model.to_empty(device=device)
    initial_value = FAMILIES[shards.config.model_family].initial_value
    for name, parameter in model.named_parameters():
        shard_spec = shards.shard_specs[name]
        whole = initial_value(name, shard_spec.shape, shards.config, seed)
        parameter.copy_(shard_spec.cut(whole, tuple(parameter.shape)))
        if name in shards.gradient_groups:
            add_hook = parameter.register_hook
            add_hook(SumGradient(shards.gradient_groups[name]))  # type: ignore[no-untyped-call]


class SumGradient:
    """A parameter's hook: its gradient is the sum of those of all ranks that hold it, taken in float32.

    The hook runs before the gradient is accumulated, and so before any ZeRO stage takes it away.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def __call__(self, gradient: Tensor) -> Tensor:
        """The sum, in the dtype of `gradient`."""
        return all_reduce(gradient.float(), self.group).to(gradient.dtype)
