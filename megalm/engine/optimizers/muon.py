"""Muon for the matrices of layers, AdamW for everything else, under tensor parallelism and ZeRO 0 to 2.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; formula as in `torch.optim.Muon`) takes the
orthogonal factor of a matrix's momentum for its step, so it needs the matrix whole. ZeRO 1 and 2 keep a range of all
matrices laid flat: those that lie in one rank's range are worked on there, each once, and those that a border cuts are
exchanged between the ranks that hold a part, which all work on it. Tensor parallelism cuts matrices further; the mode
says what becomes of that (`MuonConfig.tp_mode`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.distributed import ProcessGroup

from megalm.config.training import OptimizerConfig
from megalm.distributed.collectives import gather_json
from megalm.distributed.groups import RankGroup
from megalm.distributed.shards import ShardSpec
from megalm.engine.optimizers.adamw import STATE, adam_options, step_group
from megalm.engine.optimizers.newton_schulz import COEFFICIENTS, orthogonal_factor, update_scale
from megalm.engine.optimizers.spec import Groups, StatePart, Surroundings, decay_groups
from megalm.kernels import optimizer as reference

MOMENTUM = "momentum_buffer"


class MuonSpec:
    """The optimizer `muon`."""

    def state_kinds(self, name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        """One momentum of matrices of layers, Adam's moments of the rest."""
        return (MOMENTUM,) if orthogonalizes(name, shape) else STATE

    def parameter_groups(self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> Groups:
        """Matrices of layers; then embeddings and head with weight decay, norms and biases without."""
        matrices = [p for name, p in parameters.items() if orthogonalizes(name, tuple(p.shape))]
        rest = {name: p for name, p in parameters.items() if not orthogonalizes(name, tuple(p.shape))}
        muon = {"params": matrices, "weight_decay": config.weight_decay, "decays": True, "muon": True}
        return [group for group in (muon, *decay_groups(rest, config)) if group["params"]]

    def build(self, groups: Groups, config: OptimizerConfig, surroundings: Surroundings) -> optim.Optimizer:
        """The optimizer; `place` tells it where the matrices lie."""
        assert surroundings.zero_stage < 3, "checked: stage 3 spreads each matrix over all ranks"
        return Muon(groups, config, surroundings)


def orthogonalizes(name: str, shape: tuple[int, ...]) -> bool:
    """Whether Muon steps this parameter: a matrix of a layer."""
    return len(shape) == 2 and "layers." in name


@dataclass(frozen=True, eq=False)
class Matrix:
    """Where a matrix lies: the elements start..stop of this rank's shard are at `offset` of a flat state tensor."""

    part: StatePart
    dim: int | None
    """The dim that tensor parallelism cuts; None: every rank has the whole."""
    firsts: tuple[int, ...]
    """Where the shards of the tensor-parallel ranks begin in that dim; ranks may have the same one."""
    held: Mapping[int, tuple[int, int]]
    """The elements of the shard by rank of those with the same weights, for those that hold some."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of this rank's shard."""
        return self.part.shape

    @property
    def is_cut(self) -> bool:
        """Whether other ranks hold the rest of the shard."""
        return self.part.stop - self.part.start < self.part.size

    def of(self, flat: Tensor) -> Tensor:
        """This rank's elements of the shard in `flat`, a tensor laid out as the state is."""
        return flat.view(-1).narrow(0, self.part.offset, self.part.stop - self.part.start)


class Muon(optim.Optimizer):
    """Muon on groups marked `muon`, AdamW on the others."""

    def __init__(self, groups: Groups, config: OptimizerConfig, surroundings: Surroundings) -> None:
        super().__init__(groups, {**adam_options(config), "weight_decay": 0.0, "muon": False})
        self.config = config
        self.adamw_step = surroundings.kernels.adamw_step or reference.adamw_step
        self.groups = surroundings.groups
        self._matrices: dict[Tensor, list[Matrix]] = {}

    def place(self, parts: Sequence[StatePart]) -> None:
        """Hear where this rank's parts of all parameters lie; every rank calls it once, before the first step."""
        parts = [part for part in parts if orthogonalizes(part.name, part.shard_spec.shape)]
        device, groups = self.param_groups[0]["params"][0].device, self.groups
        ranges = _gathered([(part.start, part.stop) for part in parts], groups.weights if groups else None, device)
        firsts = _gathered([_first(part) for part in parts], groups.tensor if groups else None, device)
        for number, part in enumerate(parts):
            if part.tensor is None:
                continue
            held = {rank: found[number] for rank, found in enumerate(ranges) if found[number][0] < found[number][1]}
            begin = tuple(found[number] for found in firsts)
            matrix = Matrix(part, _cut_dim(part.shape, part.shard_spec), begin, held)
            self._matrices.setdefault(part.tensor, []).append(matrix)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update what has a gradient; gradients of matrices are written over."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not group["muon"]:
                step_group(self, group, parameters, [parameter.grad for parameter in parameters], self.adamw_step)
                continue
            for parameter in parameters:
                self._step_matrices(group, parameter)

    def _step_matrices(self, group: dict[str, Any], weights: Tensor) -> None:
        """A step of all matrices that lie in one tensor."""
        assert weights.grad is not None, "only what has a gradient"
        config, state = self.config, self.state[weights]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(weights)
        momentum, gradient = state[MOMENTUM], weights.grad
        momentum.lerp_(gradient, 1 - config.muon_momentum)
        direction = gradient.lerp_(momentum, config.muon_momentum) if config.muon_nesterov else momentum
        matrices = self._matrices.get(weights, [])
        completed = self._exchanged([matrix for matrix in matrices if matrix.is_cut], direction)
        weights.mul_(1 - group["lr"] * group["weight_decay"])
        for matrix in matrices:
            shard = completed.pop(matrix) if matrix.is_cut else matrix.of(direction).view(matrix.shape)
            update, shape = self._orthogonal(matrix, shard)
            scale = update_scale(shape, config.muon_scale_mode) * config.muon_extra_scale_factor
            own = update.reshape(-1)[matrix.part.start : matrix.part.stop]
            matrix.of(weights).add_(own, alpha=-group["lr"] * scale)

    def _exchanged(self, matrices: Sequence[Matrix], direction: Tensor) -> dict[Matrix, Tensor]:
        """The shards that a border of ZeRO's ranges cuts, whole, from the ranks that hold the rest of them."""
        shards: dict[Matrix, Tensor] = {}
        transfers = []
        for matrix in matrices:
            assert self.groups is not None, "only several ranks cut matrices"
            group, here = self.groups.weights.group, self.groups.weights.rank
            whole = direction.new_empty(matrix.part.size)
            own = whole[matrix.part.start : matrix.part.stop].copy_(matrix.of(direction))
            for rank, (start, stop) in matrix.held.items():
                if rank != here:
                    transfers.append(dist.P2POp(dist.isend, own, group=group, group_peer=rank))
                    transfers.append(dist.P2POp(dist.irecv, whole[start:stop], group=group, group_peer=rank))
            shards[matrix] = whole.view(matrix.shape)
        if transfers:
            for work in dist.batch_isend_irecv(transfers):
                work.wait()
        return shards

    def _orthogonal(self, matrix: Matrix, shard: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """This rank's part of the orthogonal factor, and the shape of what was made orthogonal."""
        config, whole = self.config, matrix.part.shard_spec.shape
        steps = (COEFFICIENTS[config.muon_coefficient_type], config.muon_num_ns_steps)
        if matrix.dim is None or config.muon_tp_mode == "blockwise":
            return orthogonal_factor(shard, *steps), matrix.shape
        assert self.groups is not None, "only several ranks cut matrices"
        group = self.groups.tensor.group
        if config.muon_tp_mode == "distributed":
            counted = matrix.part.shard_spec.is_owner
            return orthogonal_factor(shard, *steps, dim=matrix.dim, group=group, counted=counted), whole
        factor = orthogonal_factor(_joined(shard, matrix.dim, matrix.firsts, group), *steps)
        first = matrix.firsts[self.groups.tensor.rank]
        return factor.narrow(matrix.dim, first, shard.shape[matrix.dim]), whole


def _joined(shard: Tensor, dim: int, firsts: Sequence[int], group: ProcessGroup) -> Tensor:
    """The whole matrix from the shards of the group's ranks, of which some may hold the same one."""
    gathered = shard.new_empty(len(firsts) * shard.shape[0], shard.shape[1])
    dist.all_gather_into_tensor(gathered, shard.contiguous(), group=group)
    shards = gathered.view(len(firsts), *shard.shape)
    return torch.cat([shards[firsts.index(first)] for first in sorted(set(firsts))], dim)


def _cut_dim(shape: tuple[int, ...], spec: ShardSpec) -> int | None:
    """The dim in which a rank's shard is smaller than the whole matrix."""
    return next((dim for dim in range(2) if shape[dim] < spec.shape[dim]), None)


def _first(part: StatePart) -> int:
    """Where the shard begins in the dim that is cut."""
    dim = _cut_dim(part.shape, part.shard_spec)
    return 0 if dim is None else part.shard_spec.box.offsets[dim]


def _gathered(own: list[Any], ranks: RankGroup | None, device: torch.device) -> list[list[Any]]:
    """`own` of every rank of a group."""
    if ranks is None or ranks.size == 1:
        return [own]
    return gather_json(own, device, ranks.group)
