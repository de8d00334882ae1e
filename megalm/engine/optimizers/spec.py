"""What an optimizer is to the engine, to checkpoints and to the planner: state, parameter groups, how it is built.

What it builds is a plain `torch.optim.Optimizer` on fp32 tensors. Master weights, clipping, the norm over the model
copy and loss scaling lie around it: `MasterWeights` at ZeRO 0, DeepSpeed's optimizers at ZeRO 1 to 3.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn, optim

from megalm.config.training import OptimizerConfig
from megalm.distributed.groups import MeshGroups
from megalm.distributed.shards import ShardSpec
from megalm.kernels.backend import Kernels

Groups = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Where an optimizer is to work."""

    zero_stage: int
    kernels: Kernels
    groups: MeshGroups | None = None
    """None: one process."""
    offloaded: bool = False
    """Its state is in host memory, and its step there."""


class OptimizerSpec(Protocol):
    """One optimizer; stands in `OPTIMIZERS` under its name."""

    def state_kinds(self, name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The tensors of a parameter's size, fp32, that it keeps of the parameter `name`; `shape` is the whole one.

        Checkpoints hold them under these names, by slices like the weights; each is 4 bytes a parameter.
        """

    def parameter_groups(self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> Groups:
        """Groups in torch's form of all parameters, which come by name; none is empty."""

    def build(self, groups: Groups, config: OptimizerConfig, surroundings: Surroundings) -> optim.Optimizer:
        """The optimizer of these groups. ZeRO puts flat parts of the groups' masters in the place of parameters."""


@runtime_checkable
class ScaledStep(Protocol):
    """An optimizer that scales gradients, takes its step and copies masters to the model in one pass over memory."""

    def scaled_step(
        self, gradients: Mapping[Tensor, Tensor], models: Mapping[Tensor, Tensor], grad_scale: float
    ) -> None:
        """A step with gradients x `grad_scale`; both mappings are by master. Masters without a model are models."""


@dataclass(frozen=True, eq=False, kw_only=True)
class StatePart:
    """Where the fp32 state of a parameter lies on this rank.

    Elements start..stop (row-major) of the rank's shard of it, which has `shape`, are at `offset` of `tensor`, one of
    the optimizer's parameters; None: the rank keeps nothing of it.
    """

    name: str
    shard_spec: ShardSpec
    shape: tuple[int, ...]
    tensor: Tensor | None
    offset: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of elements of the shard."""
        return math.prod(self.shape)


@runtime_checkable
class Placed(Protocol):
    """An optimizer that goes by more than single elements, and so needs to know what lies where."""

    def place(self, parts: Sequence[StatePart]) -> None:
        """Hear where all parameters of this rank's model lie, in their order; every rank calls it once, at the start.

        At stage 3 it is not called.
        """


def is_matrix(parameter: Any) -> bool:
    """Whether a parameter has two dims or more; its shape is read from `ds_shape` where ZeRO-3 has taken the values
    away.
    """
    return len(getattr(parameter, "ds_shape", parameter.shape)) >= 2


DECOUPLED = ("embedding.tokens.weight", "head.weight", "generator.head.weight")
"""What --decoupled-lr is for, as Megatron's `is_embedding_or_output_parameter`."""


def decay_groups(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> Groups:
    """Matrices, which decay; norms and biases (fewer than two dims), which do not; with --decoupled-lr token embedding
    and output head in a group of their own.

    Groups say so (`decays`, `decoupled`), for the settings of a step (`Engine.train_step`).
    """
    found: dict[tuple[bool, bool], list[nn.Parameter]] = {(True, False): [], (False, False): [], (True, True): []}
    for name, parameter in parameters.items():
        found[is_matrix(parameter), config.decoupled_lr is not None and name in DECOUPLED].append(parameter)
    return [
        {"params": own, "weight_decay": config.weight_decay * decays, "decays": decays, "decoupled": decoupled}
        for (decays, decoupled), own in found.items()
        if own
    ]
