"""What every model family keeps to: all that engine, pipeline, planner and generation know of a model.

Shapes: B micro-batch, T sequence, D model width, V padded vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.config.parallel import PartitionMethod
from megalm.models.blocks.attention import KVCache
from megalm.models.blocks.segments import SegmentMemory
from megalm.models.foreign import ForeignNames

Stream = tuple[Tensor, ...]
"""What goes from layer to layer: the residual stream (B, T, D); of an encoder-decoder a second one beside it."""
Past = KVCache | SegmentMemory
"""What a model keeps of the text before: for every next token, or for the next segment."""
Losses = dict[str, Tensor]
"""By name of the loss: float32 or a mask's dtype, [B, ...]; its sum is what counts, over all but B that of a sample."""
OnLosses = Callable[[Losses, "Batch"], None]
"""Gets the detached losses of each micro-batch."""
LayerStep = Callable[[Stream], Stream]
LayerRunner = Callable[[Sequence[LayerStep], Stream], Stream]
"""Takes the stream through layers."""


class Batch(Protocol):
    """A micro-batch as models see it: tensors by name, [B, ...] each."""

    @property
    def seed(self) -> int | None:
        """Seed of what is drawn in training (dropout); None: whatever torch's generators have."""

    def __getitem__(self, name: str) -> Tensor:
        """The field `name`."""

    def get(self, name: str) -> Tensor | None:
        """The field `name`, or None if the objective has none."""


def run_in_order(steps: Sequence[LayerStep], stream: Stream) -> Stream:
    """The stream after all `steps`, one after the other."""
    for step in steps:
        stream = step(stream)
    return stream


class LanguageModel(nn.Module, ABC):
    """A model for one device, or the part of one that a pipeline stage holds.

    The whole is `embed`, then `run_layers`, then `losses` or `logits`; `forward` calls these. Of a pipeline only the
    first stage can `embed`, and only the last has `losses` and `logits`; parameters have the names of the whole model.

    Every loss has a name, a denominator of its own over the global batch and a weight:
    loss = sum over names of weight x (sum of `losses` / sum of `counts`), sums over all ranks and micro-batches. A mean
    of means would weigh tokens of sparsely masked micro-batches more.
    """

    config: ModelConfig
    layers: nn.ModuleDict
    """The layers that this part holds, by number."""
    layer_runner: LayerRunner
    """How `run_layers` goes through them: `run_in_order`, or with recomputation."""
    loss_weights: Mapping[str, float]
    """The losses, and what each weighs."""

    @abstractmethod
    def embed(self, batch: Batch) -> Stream:
        """The stream before the first layer."""

    @abstractmethod
    def run_layers(self, stream: Stream, batch: Batch, cache: Past | None = None) -> Stream:
        """The stream after the layers that this part holds; with a `cache` it continues what that has stored."""

    @abstractmethod
    def losses(self, stream: Stream, batch: Batch) -> Losses:
        """Every loss from the last layer's stream, weighted by its `counts`, float32, differentiable.

        All elements of one get the same gradient: nothing but their sum is trained on.
        """

    @abstractmethod
    def counts(self, batch: Batch) -> Losses:
        """What the denominators are sums of, from the batch alone: known before the forward pass and on every stage."""

    @abstractmethod
    def logits(self, stream: Stream) -> Tensor:
        """Logits (B, T, V) from the last layer's stream; padded vocabulary columns are -inf."""

    @abstractmethod
    def stream_shapes(self, rows: int, length: int, parts: int = 1) -> tuple[tuple[int, ...], ...]:
        """The shape of each tensor of the stream between layers, for `rows` samples of `length` tokens.

        With `parts`: of what one of so many ranks holds that share each sequence.
        """

    def _seed(self, batch: Batch) -> int | None:
        """The seed of the batch, where something is drawn from it."""
        draws = self.training and (self.config.attention_dropout > 0 or self.config.hidden_dropout > 0)
        return batch.seed if draws else None

    def forward(self, batch: Batch, cache: Past | None = None, *, wants_logits: bool = False) -> Losses | Tensor:
        """The losses of a micro-batch, or its logits, from the whole model.

        DeepSpeed hangs its hooks on this method: what runs on its engine goes through here.
        """
        stream = self.run_layers(self.embed(batch), batch, cache)
        return self.logits(stream) if wants_logits else self.losses(stream, batch)


@dataclass(frozen=True, kw_only=True)
class PartCosts:
    """What the parts of a model cost, in any one unit."""

    embedding: int
    layer: int = 0
    """Of each layer, where all cost the same."""
    head: int
    layers: tuple[int, ...] = ()
    """Of each layer, where they differ."""

    def of_stages(self, layers: Sequence[range]) -> list[int]:
        """The cost of each pipeline stage, from the layers of each."""
        costs = [sum(self.layers[numbers.start : numbers.stop]) + len(numbers) * self.layer for numbers in layers]
        costs[0] += self.embedding
        costs[-1] += self.head
        return costs


class Build(Protocol):
    """How a model comes about."""

    def __call__(
        self,
        config: ModelConfig,
        padded_vocab_size: int | None = None,
        *,
        layers: Iterable[int] | None = None,
        has_embedding: bool = True,
        has_head: bool = True,
    ) -> LanguageModel:
        """The model, or the stage with these layers, on torch's current device.

        `padded_vocab_size` is the number of rows of vocabulary tables (default: padding for one device).
        """


class Flops(Protocol):
    """How much a model computes."""

    def __call__(self, config: ModelConfig, seq_length: int, padded_vocab_size: int | None = None) -> int:
        """Floating-point operations of one token's forward and backward pass."""


@dataclass(frozen=True)
class Part:
    """A model within a model."""

    config: ModelConfig
    name_in_whole: Callable[[str], str]
    """Of one of its parameters, the name that it has in the whole model."""


def whole_model(config: ModelConfig, _architecture: str | None) -> Part:
    """All of it, whatever the class."""
    return Part(config, str)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models: an entry of `FAMILIES`. Its sharding plan has the same name in `parallel.plans.PLANS`."""

    build: Build
    initial_value: Callable[[str, tuple[int, ...], ModelConfig, int], Tensor]
    """(parameter's name, its whole shape, configuration, seed) -> its initial value, float32 on CPU."""
    num_parameters: Callable[[ModelConfig], int]
    training_flops_per_token: Flops
    part_costs: Callable[[ModelConfig, int, PartitionMethod], PartCosts]
    """(configuration, sequence length, what to count) -> parameters or FLOPs of a part."""
    shared_parameters: Callable[[ModelConfig], tuple[str, ...]]
    """Parameters that both the first and the last pipeline stage hold."""
    hugging_face: Mapping[str, ForeignNames] = field(default_factory=dict)
    """Classes of transformers that are models of the family -> how they call their tensors."""
    part: Callable[[ModelConfig, str | None], Part] = whole_model
    """(configuration, class of transformers, or None for what is wanted of the model) -> what of a model such a class
    holds."""
