"""The tensor-parallel region: what layers need to know of it, and the ways in and out.

Outside the region every rank of the group has the same activations, or with sequence parallelism its part of the
sequence; inside, each has its own heads, feed-forward channels or vocabulary rows of the whole sequence.

Shapes: B batch, T sequence, D model width; T is a rank's part of it outside the region under sequence parallelism.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megalm.config.model import ModelConfig
from megalm.distributed.functional import (
    all_gather_sequence,
    all_reduce_from_region,
    copy_to_region,
    reduce_scatter_sequence,
)
from megalm.distributed.groups import MeshGroups
from megalm.distributed.mesh import Axis

SEQUENCE = 1
"""The dim of activations that sequence parallelism splits."""


@dataclass(frozen=True)
class TensorParallel:
    """This rank among those that share each layer."""

    group: ProcessGroup
    rank: int
    size: int
    kv_copies: int
    """How many neighbouring ranks hold the same key and value heads: more than 1 with fewer heads than ranks."""
    kv_group: ProcessGroup
    """The ranks that hold the same key and value heads as this one."""
    sequence_parallel: bool

    @classmethod
    def build(cls, groups: MeshGroups, config: ModelConfig, sequence_parallel: bool) -> "TensorParallel":
        """This rank's group; every rank of the job calls it, once."""
        size = groups.tensor.size
        copies = max(1, size // config.num_kv_heads)
        return cls(
            group=groups.tensor.group,
            rank=groups.tensor.rank,
            size=size,
            kv_copies=copies,
            kv_group=groups.neighbours(Axis.TP, copies),
            sequence_parallel=sequence_parallel and size > 1,
        )

    def to_region(self, x_BTD: Tensor) -> Tensor:
        """The whole sequence, for work that differs from rank to rank."""
        if self.sequence_parallel:
            return all_gather_sequence(x_BTD, self.group, SEQUENCE)
        return copy_to_region(x_BTD, self.group)

    def from_region(self, x_BTD: Tensor) -> Tensor:
        """From the ranks' terms to what stands outside the region."""
        if self.sequence_parallel:
            return reduce_scatter_sequence(x_BTD, self.group, SEQUENCE)
        return all_reduce_from_region(x_BTD, self.group)


class InputHook:
    """A forward pre-hook: the first argument of the module, or the first few, enter the region."""

    def __init__(self, tp: TensorParallel, inputs: int = 1) -> None:
        self.tp, self.inputs = tp, inputs

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The arguments with which the module runs."""
        return (*map(self.tp.to_region, arguments[: self.inputs]), *arguments[self.inputs :])
