"""The table that says which layer of the one-device model gets which parallel form, and its application.

    with torch.device("meta"):
        model = GPT(config, config.padded_vocab_size(place.size))
    shards = parallelize(model, place)
    materialize(model, shards, config, seed, device)

The model is cut while it is on the meta device, and its values are drawn one parameter at a time, so no rank ever holds
the whole.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megalm.config.model import ModelConfig
from megalm.dist.functional import all_reduce
from megalm.dist.slices import Placement, Rectangle
from megalm.models.attention import CausalAttention
from megalm.models.gpt import GPT
from megalm.models.init import initial_value
from megalm.models.layers import FullLogits, TokenLoss
from megalm.parallel.randomness import OwnDropout
from megalm.parallel.region import Entrance, TensorParallel
from megalm.parallel.sequence import SequenceParallelDropout, SequenceParallelPositions
from megalm.parallel.tensor import ColumnParallelLinear, RowParallelLinear
from megalm.parallel.vocab import GatheredLogits, VocabParallelEmbedding, VocabParallelTokenLoss


@dataclass
class Shards:
    """What a rank holds of a model, by parameter name."""

    placements: dict[str, Placement] = field(default_factory=dict)
    gradient_groups: dict[str, ProcessGroup] = field(default_factory=dict)
    """Parameters that several ranks hold and use for different work: their gradients are summed over these ranks."""

    def place(self, name: str, placement: Placement, gradient_group: ProcessGroup | None = None) -> None:
        """Note one parameter."""
        assert name not in self.placements, f"parameter {name} is placed once"
        self.placements[name] = placement
        if gradient_group is not None:
            self.gradient_groups[name] = gradient_group


Style = Callable[[nn.Module, str, TensorParallel, ModelConfig, Shards], nn.Module]
"""Gives a module its parallel form and notes its parameters; gets the module, its name, and what it depends on."""


def replicated(module: nn.Module, name: str, place: TensorParallel, config: ModelConfig, shards: Shards) -> nn.Module:
    """The same on every rank; under sequence parallelism each rank uses it for its part of the sequence."""
    for inner, parameter in module.named_parameters(name):
        counted = Placement.of_whole(tuple(parameter.shape), counted=place.rank == 0)
        shards.place(inner, counted, place.group if place.sequence_parallel else None)
    return module


def head_norm(module: nn.Module, name: str, place: TensorParallel, config: ModelConfig, shards: Shards) -> nn.Module:
    """The same on every rank, each of which uses it for its own heads."""
    for inner, parameter in module.named_parameters(name):
        shards.place(inner, Placement.of_whole(tuple(parameter.shape), counted=place.rank == 0), place.group)
    return module


def positions(module: nn.Module, name: str, place: TensorParallel, config: ModelConfig, shards: Shards) -> nn.Module:
    """A table that is whole on every rank."""
    assert isinstance(module, nn.Embedding)
    replicated(module, name, place, config, shards)
    if not place.sequence_parallel:
        return module
    return SequenceParallelPositions(place, module.num_embeddings, module.embedding_dim)


def column(module: nn.Module, name: str, place: TensorParallel, config: ModelConfig, shards: Shards) -> nn.Module:
    """Output channels spread over the ranks."""
    return _columns(module, name, place.rank, place.size, shards)


def kv_column(module: nn.Module, name: str, place: TensorParallel, config: ModelConfig, shards: Shards) -> nn.Module:
    """Output channels, heads of keys or values, spread over the ranks; fewer heads than ranks are held several times."""
    copies = place.kv_copies
    spread = _columns(module, name, place.rank // copies, place.size // copies, shards, place.rank % copies == 0)
    if copies > 1:
        shards.gradient_groups |= {inner: place.kv_group for inner, _ in spread.named_parameters(name)}
    return spread


def row(module: nn.Module, name: str, place: TensorParallel, config: ModelConfig, shards: Shards) -> nn.Module:
    """Input channels spread over the ranks, bias on all of them."""
    assert isinstance(module, nn.Linear)
    outputs, inputs, has_bias = module.out_features, module.in_features, module.bias is not None
    spread = RowParallelLinear(place, _share(inputs, place.size, name), outputs, has_bias)
    columns = _run(inputs, place.rank, place.size)
    shards.place(f"{name}.weight", Placement((outputs, inputs), Rectangle((0, outputs), columns)))
    if has_bias:
        bias = Placement.of_whole((outputs,), counted=place.rank == 0)
        shards.place(f"{name}.bias", bias, place.group if place.sequence_parallel else None)
    return spread


def vocabulary(module: nn.Module, name: str, place: TensorParallel, config: ModelConfig, shards: Shards) -> nn.Module:
    """Rows of the token embedding spread over the ranks."""
    assert isinstance(module, nn.Embedding)
    _place_vocabulary(f"{name}.weight", module.num_embeddings, module.embedding_dim, place, config, shards)
    return VocabParallelEmbedding(place, module.num_embeddings, module.embedding_dim) if place.size > 1 else module


def head(module: nn.Module, name: str, place: TensorParallel, config: ModelConfig, shards: Shards) -> nn.Module:
    """Rows of the output head spread over the ranks; a tied head has none of its own."""
    if isinstance(module, nn.Linear):
        _place_vocabulary(f"{name}.weight", module.out_features, module.in_features, place, config, shards)
        if place.size > 1:
            module = ColumnParallelLinear(module.in_features, module.out_features // place.size, bias=False)
    return region(module, name, place, config, shards)


def region(module: nn.Module, name: str, place: TensorParallel, config: ModelConfig, shards: Shards) -> nn.Module:
    """The module's input enters the region."""
    if place.size > 1:
        module.register_forward_pre_hook(Entrance(place))
    return module


def token_loss(module: nn.Module, name: str, place: TensorParallel, config: ModelConfig, shards: Shards) -> nn.Module:
    """The loss from logits that no rank has whole."""
    assert isinstance(module, TokenLoss)
    return VocabParallelTokenLoss(place, module.vocab_size) if place.size > 1 else module


def logits(module: nn.Module, name: str, place: TensorParallel, config: ModelConfig, shards: Shards) -> nn.Module:
    """Whole logits for generation."""
    assert isinstance(module, FullLogits)
    return GatheredLogits(place, module.vocab_size) if place.size > 1 else module


def dropout(module: nn.Module, name: str, place: TensorParallel, config: ModelConfig, shards: Shards) -> nn.Module:
    """Dropout outside the region."""
    assert isinstance(module, nn.Dropout)
    return SequenceParallelDropout(place, module.p) if place.sequence_parallel else module


def core(module: nn.Module, name: str, place: TensorParallel, config: ModelConfig, shards: Shards) -> nn.Module:
    """Dropout inside the region."""
    assert isinstance(module, CausalAttention)
    return OwnDropout(module, place.rank) if module.dropout > 0.0 else module


GPT_PLAN: tuple[tuple[str, Style], ...] = (
    (r"embedding\.tokens", vocabulary),
    (r"embedding\.positions", positions),
    (r"embedding\.dropout", dropout),
    (r"layers\.\d+\.(attention|mlp)_norm", replicated),
    (r"layers\.\d+\.(attention|mlp)", region),
    (r"layers\.\d+\.attention\.wq", column),
    (r"layers\.\d+\.attention\.w[kv]", kv_column),
    (r"layers\.\d+\.attention\.[qk]_norm", head_norm),
    (r"layers\.\d+\.attention\.core", core),
    (r"layers\.\d+\.attention\.wo", row),
    (r"layers\.\d+\.mlp\.w_(gate|up)", column),
    (r"layers\.\d+\.mlp\.w_down", row),
    (r"layers\.\d+\.dropout", dropout),
    (r"final_norm", replicated),
    (r"head", head),
    (r"token_loss", token_loss),
    (r"full_logits", logits),
)
"""Patterns match a module's whole name; each matches something in a model that has the part, and no two the same."""

_NOT_IN_EVERY_MODEL = {r"embedding\.positions"}


def parallelize(model: GPT, place: TensorParallel) -> Shards:
    """Give every layer of `model`, which is on the meta device, its parallel form, in place; what the rank then holds.

    `model` may be a pipeline stage. A model group of one rank goes the same way, with every layer as it was.
    """
    check_plan(model.config)
    shards = Shards()
    expected = {name for name, _ in model.named_parameters()}
    with torch.device("meta"):
        for name, module in list(model.named_modules()):
            for pattern, style in GPT_PLAN:
                if re.fullmatch(pattern, name):
                    _replace(model, name, style(module, name, place, model.config, shards))
    left = expected ^ set(shards.placements)
    assert not left, f"the plan places every parameter of the model and no other, not {sorted(left)}"
    return shards


def check_plan(config: ModelConfig, plan: tuple[tuple[str, Style], ...] = GPT_PLAN) -> None:
    """Assert that every pattern matches a module of the model, and no module two of them."""
    with torch.device("meta"):
        names = [name for name, _ in GPT(config.model_copy(update={"num_layers": 1})).named_modules()]
    for pattern, _ in plan:
        found = any(re.fullmatch(pattern, name) for name in names)
        assert found or pattern in _NOT_IN_EVERY_MODEL, f"pattern {pattern} of the plan matches no module"
    for name in names:
        patterns = [pattern for pattern, _ in plan if re.fullmatch(pattern, name)]
        assert len(patterns) <= 1, f"module {name} matches several patterns of the plan: {patterns}"


@torch.no_grad()
def materialize(model: nn.Module, shards: Shards, config: ModelConfig, seed: int, device: torch.device) -> None:
    """Give a model on the meta device memory on `device` and its initial values, which do not depend on the layout.

    Each parameter is drawn whole, by name, and cut.
    """
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        placement = shards.placements[name]
        parameter.copy_(placement.cut(initial_value(name, placement.shape, config, seed), tuple(parameter.shape)))
        if name in shards.gradient_groups:
            parameter.register_hook(SumGradient(shards.gradient_groups[name]))


class SumGradient:
    """A parameter's hook: its gradient is the sum of those of all ranks that hold it, taken in float32.

    The hook runs before the gradient is accumulated, and so before any ZeRO stage takes it away.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def __call__(self, gradient: Tensor) -> Tensor:
        """The sum, in the dtype of `gradient`."""
        return all_reduce(gradient.float(), self.group).to(gradient.dtype)


def _columns(
    module: nn.Module, name: str, part: int, parts: int, shards: Shards, counted: bool = True
) -> ColumnParallelLinear:
    """Run `part` of `parts` of the output channels of a linear layer."""
    assert isinstance(module, nn.Linear)
    outputs, inputs, has_bias = module.out_features, module.in_features, module.bias is not None
    spread = ColumnParallelLinear(inputs, _share(outputs, parts, name), has_bias)
    rows = _run(outputs, part, parts)
    shards.place(f"{name}.weight", Placement((outputs, inputs), Rectangle(rows, (0, inputs)), counted))
    if has_bias:
        shards.place(f"{name}.bias", Placement((outputs,), Rectangle(rows, (0, 1)), counted))
    return spread


def _place_vocabulary(
    name: str, padded_rows: int, width: int, place: TensorParallel, config: ModelConfig, shards: Shards
) -> None:
    """This rank's run of the padded rows, of which the padding is no part of the global tensor."""
    assert config.vocab_size is not None, "vocab_size is filled from the tokenizer before the model is built"
    start, stop = (min(edge, config.vocab_size) for edge in _run(padded_rows, place.rank, place.size))
    shards.place(name, Placement((config.vocab_size, width), Rectangle((start, stop), (0, width))))


def _share(size: int, parts: int, name: str) -> int:
    assert size % parts == 0, f"{size} channels of {name} are a multiple of {parts} ranks"
    return size // parts


def _run(size: int, part: int, parts: int) -> tuple[int, int]:
    """Run `part` of `size` elements dealt out in `parts` equal runs."""
    return size // parts * part, size // parts * (part + 1)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the model's module `name`."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
