"""The parallel forms that a layer of the one-device model can get: what `plan` has tables of.

A style takes a module on the meta device, its name in the model, and the `Shards` in which it notes what this rank
holds of the module's parameters; it gives the module that takes its place, on a group of one rank the module itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed import ProcessGroup

from megalm.config.model import ModelConfig
from megalm.distributed.shards import ShardSpec
from megalm.models.blocks.attention import CausalAttention
from megalm.models.blocks.bidirectional import BidirectionalAttention
from megalm.models.blocks.dropout import Dropout
from megalm.models.blocks.head import FullLogits, OutputBias, TokenLoss
from megalm.models.blocks.norm import FullWidthRMSNorm
from megalm.models.blocks.relative import RelativeBias, UnscaledAttention
from megalm.models.blocks.sampling import TokenSampler
from megalm.parallel.norm import FullWidthParallelRMSNorm
from megalm.parallel.randomness import ChannelParallelDropout, OwnDropout
from megalm.parallel.region import InputHook, TensorParallel
from megalm.parallel.relative import OwnHeadsBias
from megalm.parallel.sequence import SequenceParallelDropout, SequenceParallelPositions, WholeSequenceHook
from megalm.parallel.tensor import ColumnParallelLinear, RowParallelLinear
from megalm.parallel.vocab import (
    GatheredLogits,
    VocabParallelEmbedding,
    VocabParallelHead,
    VocabParallelTiedHead,
    VocabParallelTokenLoss,
    VocabParallelTokenSampler,
)


@dataclass
class Shards:
    """What a rank holds of a model, by parameter name."""

    tp: TensorParallel
    config: ModelConfig
    shard_specs: dict[str, ShardSpec] = field(default_factory=dict)
    gradient_groups: dict[str, ProcessGroup] = field(default_factory=dict)
    """Parameters that several ranks hold and use for different work: their gradients are summed over these ranks."""

    def add(self, name: str, shard_spec: ShardSpec, gradient_group: ProcessGroup | None = None) -> None:
        """Note one parameter."""
        assert name not in self.shard_specs, f"parameter {name} is placed once"
        self.shard_specs[name] = shard_spec
        if gradient_group is not None and self.tp.size > 1:
            self.gradient_groups[name] = gradient_group

    def add_whole(self, name: str, shape: tuple[int, ...], *, same_work: bool) -> None:
        """Note a parameter that every rank holds, either for the same work or each for its part of it."""
        self.add(name, ShardSpec.of_whole(shape, is_owner=self.tp.rank == 0), None if same_work else self.tp.group)

    def add_rows(
        self, name: str, shape: tuple[int, ...], part: int, parts: int, *, gradient_group: ProcessGroup | None = None
    ) -> None:
        """Note run `part` of `parts` of the rows of a tensor; with a `gradient_group`, its first rank counts it."""
        is_owner = gradient_group is None or self.tp.rank % self.tp.kv_copies == 0
        start, stop = _run(shape[0], part, parts)
        self.add(name, ShardSpec.of_dim(shape, 0, start, stop, is_owner=is_owner), gradient_group)


Style = Callable[[nn.Module, str, Shards], nn.Module]


@dataclass(frozen=True)
class ShardingPlan:
    """Which layers of a model family get which style."""

    rules: tuple[tuple[str, Style], ...]
    """(pattern, style): patterns match a module's whole name; no two match the same module."""
    optional: frozenset[str] = frozenset()
    """Patterns that match nothing in some models of the family; each of the others matches something."""


def replicated(module: nn.Module, name: str, shards: Shards) -> nn.Module:
    """The same on every rank; under sequence parallelism each rank uses it for its part of the sequence."""
    for inner, parameter in module.named_parameters(name):
        shards.add_whole(inner, tuple(parameter.shape), same_work=not shards.tp.sequence_parallel)
    return module


def q_norm(module: nn.Module, name: str, shards: Shards) -> nn.Module:
    """The norm of queries, by head or over all heads."""
    return _qk_norm(module, name, shards, copies=1)


def k_norm(module: nn.Module, name: str, shards: Shards) -> nn.Module:
    """The norm of keys, by head or over all heads, of which several ranks may hold the same."""
    return _qk_norm(module, name, shards, copies=shards.tp.kv_copies)


def _qk_norm(module: nn.Module, name: str, shards: Shards, copies: int) -> nn.Module:
    tp = shards.tp
    if not isinstance(module, FullWidthRMSNorm):  # the same on every rank, each of which uses it for its own heads
        for inner, parameter in module.named_parameters(name):
            shards.add_whole(inner, tuple(parameter.shape), same_work=False)
        return module
    part, parts = tp.rank // copies, tp.size // copies
    group = tp.kv_group if copies > 1 else None
    shards.add_rows(f"{name}.weight", tuple(module.weight.shape), part, parts, gradient_group=group)
    return module if tp.size == 1 else FullWidthParallelRMSNorm(module, tp, parts)


def positions(module: nn.Module, name: str, shards: Shards) -> nn.Module:
    """A table that is whole on every rank."""
    assert isinstance(module, nn.Embedding)
    replicated(module, name, shards)
    if not shards.tp.sequence_parallel:
        return module
    return SequenceParallelPositions(shards.tp, module.num_embeddings, module.embedding_dim)


def column(module: nn.Module, name: str, shards: Shards) -> nn.Module:
    """Output channels spread over the ranks."""
    return _column(module, name, shards, shards.tp.rank, shards.tp.size)


def kv_column(module: nn.Module, name: str, shards: Shards) -> nn.Module:
    """Heads of keys or values spread over the ranks; where there are fewer heads than ranks, several hold the same."""
    tp = shards.tp
    if tp.kv_copies == 1:
        return column(module, name, shards)
    part, parts = tp.rank // tp.kv_copies, tp.size // tp.kv_copies
    return _column(module, name, shards, part, parts, tp.kv_group)


def row(module: nn.Module, name: str, shards: Shards) -> nn.Module:
    """Input channels spread over the ranks, bias on all of them."""
    assert isinstance(module, nn.Linear)
    tp, outputs, inputs = shards.tp, module.out_features, module.in_features
    start, stop = _run(inputs, tp.rank, tp.size)
    shards.add(f"{name}.weight", ShardSpec.of_dim((outputs, inputs), 1, start, stop))
    if module.bias is not None:
        shards.add_whole(f"{name}.bias", (outputs,), same_work=not tp.sequence_parallel)
    if tp.size == 1:
        return module
    return RowParallelLinear(tp, stop - start, outputs, bias=module.bias is not None)


def vocabulary(module: nn.Module, name: str, shards: Shards) -> nn.Module:
    """Rows of the token embedding spread over the ranks."""
    assert isinstance(module, nn.Embedding)
    rows, width = module.num_embeddings, module.embedding_dim
    _add_vocabulary(f"{name}.weight", (rows, width), shards)
    return module if shards.tp.size == 1 else VocabParallelEmbedding(shards.tp, rows, width)


def head(module: nn.Module, name: str, shards: Shards) -> nn.Module:
    """Rows of the output head spread over the ranks; a tied head has none of its own."""
    if isinstance(module, nn.Linear):
        rows, width = module.out_features, module.in_features
        _add_vocabulary(f"{name}.weight", (rows, width), shards)
        if shards.tp.size > 1:
            module = VocabParallelHead(width, rows // shards.tp.size)
    elif shards.tp.size > 1:
        module = VocabParallelTiedHead()
    return region_input(module, name, shards)


def region_input(module: nn.Module, name: str, shards: Shards) -> nn.Module:
    """The module's input enters the tensor-parallel region."""
    if shards.tp.size > 1:
        module.register_forward_pre_hook(InputHook(shards.tp))
    return module


def region_inputs(module: nn.Module, name: str, shards: Shards) -> nn.Module:
    """The first two inputs of the module enter the tensor-parallel region: a sequence, and what it attends to."""
    if shards.tp.size > 1:
        module.register_forward_pre_hook(InputHook(shards.tp, inputs=2))
    return module


def used_by_heads(module: nn.Module, name: str, shards: Shards) -> nn.Module:
    """The same on every rank, each of which uses what is for its own heads."""
    for inner, parameter in module.named_parameters(name):
        shards.add_whole(inner, tuple(parameter.shape), same_work=False)
    return module


def rows_of_heads(module: nn.Module, name: str, shards: Shards) -> nn.Module:
    """Parameters of the module itself, whose first dim goes by head: each rank has those of its own heads."""
    tp = shards.tp
    for inner, parameter in list(module.named_parameters(recurse=False)):
        rows, *rest = parameter.shape
        shards.add_rows(f"{name}.{inner}", (rows, *rest), tp.rank, tp.size)
        setattr(module, inner, nn.Parameter(torch.empty(rows // tp.size, *rest)))
    return module


def relative_bias(module: nn.Module, name: str, shards: Shards) -> nn.Module:
    """The bias of the rank's own heads."""
    assert isinstance(module, RelativeBias)
    return module if shards.tp.size == 1 else OwnHeadsBias(module, shards.tp)


def token_loss(module: nn.Module, name: str, shards: Shards) -> nn.Module:
    """The loss from logits that no rank has whole."""
    assert isinstance(module, TokenLoss)
    return module if shards.tp.size == 1 else VocabParallelTokenLoss(shards.tp, module.vocab_size)


def token_sampler(module: nn.Module, name: str, shards: Shards) -> nn.Module:
    """Draws from logits that no rank has whole."""
    assert isinstance(module, TokenSampler)
    return module if shards.tp.size == 1 else VocabParallelTokenSampler(shards.tp, module.vocab_size)


def logits(module: nn.Module, name: str, shards: Shards) -> nn.Module:
    """Whole logits for generation."""
    assert isinstance(module, FullLogits)
    return module if shards.tp.size == 1 else GatheredLogits(shards.tp, module.vocab_size)


def vocabulary_bias(module: nn.Module, name: str, shards: Shards) -> nn.Module:
    """Biases of logits spread over the ranks as the head's rows are."""
    assert isinstance(module, OutputBias)
    padded_rows = module.bias.numel()
    _add_vocabulary(f"{name}.bias", (padded_rows,), shards)
    return module if shards.tp.size == 1 else OutputBias(padded_rows // shards.tp.size)


def whole_sequence(module: nn.Module, name: str, shards: Shards) -> nn.Module:
    """The same work on every rank, on the whole sequence, which sequence parallelism gathers first."""
    for inner, parameter in module.named_parameters(name):
        shards.add_whole(inner, tuple(parameter.shape), same_work=True)
    if shards.tp.sequence_parallel:
        module.register_forward_pre_hook(WholeSequenceHook(shards.tp))
    return module


def dropout(module: nn.Module, name: str, shards: Shards) -> nn.Module:
    """Dropout outside the region."""
    assert isinstance(module, Dropout)
    return SequenceParallelDropout(shards.tp, module.p) if shards.tp.sequence_parallel else module


def channel_dropout(module: nn.Module, name: str, shards: Shards) -> nn.Module:
    """Dropout inside the region, of channels spread over the ranks."""
    assert isinstance(module, Dropout)
    return ChannelParallelDropout(shards.tp, module.p) if shards.tp.size > 1 else module


def attention_core(module: nn.Module, name: str, shards: Shards) -> nn.Module:
    """Dropout inside the region; kept apart on a group of one rank too, so that layouts agree outside the region."""
    assert isinstance(module, CausalAttention | BidirectionalAttention | UnscaledAttention)
    return OwnDropout(module, shards.tp.rank) if module.dropout > 0.0 else module


def _column(
    module: nn.Module, name: str, shards: Shards, part: int, parts: int, gradient_group: ProcessGroup | None = None
) -> nn.Module:
    """Run `part` of `parts` of the output channels of a linear layer."""
    assert isinstance(module, nn.Linear)
    outputs, inputs = module.out_features, module.in_features
    shards.add_rows(f"{name}.weight", (outputs, inputs), part, parts, gradient_group=gradient_group)
    if module.bias is not None:
        shards.add_rows(f"{name}.bias", (outputs,), part, parts, gradient_group=gradient_group)
    if shards.tp.size == 1:
        return module
    return ColumnParallelLinear(inputs, outputs // parts, bias=module.bias is not None)


def _add_vocabulary(name: str, padded: tuple[int, ...], shards: Shards) -> None:
    """Note this rank's run of the rows of a padded shape, of which the padding is no part of the global tensor."""
    vocab_size, tp = shards.config.vocab_size, shards.tp
    assert vocab_size is not None, "vocab_size is filled from the tokenizer before the model is built"
    start, stop = (min(edge, vocab_size) for edge in _run(padded[0], tp.rank, tp.size))
    shards.add(name, ShardSpec.of_dim((vocab_size, *padded[1:]), 0, start, stop))


def _run(size: int, part: int, parts: int) -> tuple[int, int]:
    """Run `part` of `size` elements dealt out in `parts` equal runs."""
    assert size % parts == 0, f"{size} channels are a multiple of {parts} ranks"
    return size // parts * part, size // parts * (part + 1)
