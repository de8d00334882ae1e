"""Parameters and floating-point operations of an encoder, from its configuration alone.

Counted on the meta device: parameters are those of the built model, and of operations only matrix products count,
each element of a weight matrix 2 a token (as in models/gpt/flops.py).
"""

from dataclasses import dataclass

import torch
from torch import nn

from megalm.config.model import ModelConfig
from megalm.config.parallel import PartitionMethod
from megalm.models.bert.model import Bert
from megalm.models.contract import PartCosts


def num_parameters(config: ModelConfig, padded_vocab_size: int | None = None) -> int:
    """Parameters of the model that `Bert(config, padded_vocab_size)` builds."""
    parts = _Parts.of(config, padded_vocab_size)
    layers = sum(elements(parts.layer(number)) for number in range(config.num_layers))
    tied = parts.tokens if config.tied else 0  # `_Parts` has the table on both sides
    return elements(parts.begin) + layers + elements(parts.end) - tied


def training_flops_per_token(config: ModelConfig, seq_length: int, padded_vocab_size: int | None = None) -> int:
    """Operations of one token's forward and backward pass, three times the forward's, without recomputation."""
    parts = _Parts.of(config, padded_vocab_size)
    layers = sum(_layer_flops(config, parts, number, seq_length) for number in range(config.num_layers))
    return 3 * (_begin_flops(parts) + layers + _end_flops(config, parts, seq_length))


def part_costs(config: ModelConfig, seq_length: int, method: PartitionMethod) -> PartCosts:
    """Parameters (with tied weights the head holds its own copy), or FLOPs of one token's forward pass."""
    parts, numbers = _Parts.of(config, None), range(config.num_layers)
    if method == "parameters":
        layers = sum(elements(parts.layer(number)) for number in numbers)
        return PartCosts(embedding=elements(parts.begin), layer=layers // len(numbers), head=elements(parts.end))
    layers = sum(_layer_flops(config, parts, number, seq_length) for number in numbers)
    head = _end_flops(config, parts, seq_length)
    return PartCosts(embedding=_begin_flops(parts), layer=layers // len(numbers), head=head)


@dataclass(frozen=True)
class _Parts:
    """The model in parts, on the meta device; layers after the second are as that."""

    begin: Bert
    layers: tuple[Bert, ...]
    end: Bert
    tokens: int
    """Elements of the table of tokens."""

    @classmethod
    def of(cls, config: ModelConfig, rows: int | None) -> "_Parts":
        rows = config.padded_vocab_size() if rows is None else rows
        with torch.device("meta"):
            begin = Bert(config, rows, layers=[], has_head=False)
            end = Bert(config, rows, layers=[], has_embedding=False)
            layers = [Bert(config, rows, layers=[n], has_embedding=False, has_head=False) for n in (0, 1)]
        return cls(begin, tuple(layers), end, rows * config.embedding_width)

    def layer(self, number: int) -> nn.Module:
        """One of them."""
        return self.layers[min(number, 1)]


def elements(part: nn.Module) -> int:
    """Parameters of a part of a model."""
    return sum(parameter.numel() for parameter in part.parameters())


def matrix_elements(part: nn.Module) -> int:
    """Those of its linear layers."""
    return sum(module.weight.numel() for module in part.modules() if isinstance(module, nn.Linear))


def _begin_flops(parts: _Parts) -> int:
    return 2 * matrix_elements(parts.begin)


def _layer_flops(config: ModelConfig, parts: _Parts, number: int, seq_length: int) -> int:
    return 2 * matrix_elements(parts.layer(number)) + score_flops(config, number, seq_length)


def score_flops(config: ModelConfig, number: int, seq_length: int) -> int:
    """Of a token in layer `number`: two products, q k^T and scores x v, each 2 x query_width operations for a query and
    a key that it sees.
    """
    scores_per_key = 4 * config.num_attention_heads * config.head_dim
    return scores_per_key * _keys(config.window_of(number), seq_length) // seq_length


def _end_flops(config: ModelConfig, parts: _Parts, seq_length: int) -> int:
    """The heads; that of sentences runs once a sequence."""
    sentence = matrix_elements(parts.end.sentence_head) if config.has_sentence_head else 0
    tied = parts.tokens if config.tied else 0
    return 2 * (matrix_elements(parts.end) - sentence + tied) + 2 * sentence // seq_length


def _keys(window: tuple[int, int] | None, seq_length: int) -> int:
    """Keys that the queries of one sequence see together."""
    if window is None:
        return seq_length**2
    before, after = (min(size, seq_length - 1) for size in window)
    return seq_length * (1 + before + after) - before * (before + 1) // 2 - after * (after + 1) // 2
