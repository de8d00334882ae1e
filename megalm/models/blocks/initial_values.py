"""Initial values that do not depend on the layout: each parameter is drawn whole from a generator of its own name.

A rank that holds a slice draws the whole tensor of that one parameter and keeps its slice, so every layout starts
from the same weights. A family's table says which `Rule` draws which parameter.
"""

import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megalm.config.model import ModelConfig
from megalm.errors import ConfigError
from megalm.models.blocks.randomness import named_generator

Shape = tuple[int, ...]
Rule = Callable[[Shape, ModelConfig, torch.Generator], Tensor]
Rules = Sequence[tuple[str, Rule]]
"""(pattern, rule): patterns match a parameter's whole name; every parameter matches exactly one."""


def value_by_rules(rules: Rules, place: str, name: str, shape: Shape, config: ModelConfig, seed: int) -> Tensor:
    """The whole initial tensor of parameter `name`, float32 on CPU, by the one rule that matches it.

    Raises:
        ConfigError: no rule, or more than one; `place` is the file with the table.
    """
    found = [rule for pattern, rule in rules if re.fullmatch(pattern, name)]
    if len(found) != 1:
        raise ConfigError(
            f"parameter {name} matches {len(found)} rules of initial values and must match exactly one; "
            f"add its pattern to the table in {place}"
        )
    return found[0](tuple(shape), config, named_generator(seed, "init", name))


def matrix(shape: Shape, config: ModelConfig, generator: torch.Generator, outputs: int | None = None) -> Tensor:
    """A matrix of the run's distribution; `outputs` are those of the matrix that it is part of in Megatron."""
    if config.init_method_xavier_uniform:
        bound = math.sqrt(6 / ((outputs or shape[0]) + shape[1]))
        return torch.rand(shape, generator=generator).mul_(2 * bound).sub_(bound)
    return torch.randn(shape, generator=generator).mul_(config.init_method_std)


def query_key_value(shape: Shape, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """One of the three projections to heads."""
    outputs = (config.num_attention_heads + 2 * config.num_kv_heads) * config.head_dim
    return matrix(shape, config, generator, outputs)


def gate_up(shape: Shape, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """One of the first projections of the MLP."""
    return matrix(shape, config, generator, config.ffn_size * (2 if config.swiglu else 1))


def output_projection(shape: Shape, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """The end of a branch: smaller by 1 / sqrt(2 x num_layers), unless the sum with the stream is normalized."""
    drawn = matrix(shape, config, generator)
    # Megatron's scaled_init_method is not scaled under xavier either
    plain = config.init_method_xavier_uniform or config.norm_order == "post"
    return drawn if plain else drawn.div_(math.sqrt(2 * config.num_layers))


def vocabulary(shape: Shape, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """Rows past vocab_size are zero; the rows before are drawn alone, so that they do not depend on the padding."""
    assert config.vocab_size is not None, "vocab_size is filled from the tokenizer before the model is built"
    table = torch.zeros(shape)
    table[: config.vocab_size] = matrix((config.vocab_size, *shape[1:]), config, generator, config.padded_vocab_size())
    return table


def norm_weight(shape: Shape, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """A norm that changes no scale."""
    return torch.full(shape, 0.0 if config.apply_layernorm_1p else 1.0)


def normal(shape: Shape, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """A vector that starts as matrices do."""
    return torch.randn(shape, generator=generator).mul_(config.init_method_std)


def zeros(shape: Shape, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """A bias."""
    return torch.zeros(shape)
