"""Initial values that do not depend on the layout: each parameter is drawn whole from a generator of its own name.

A rank that holds a slice draws the whole tensor of that one parameter and keeps its slice, so every layout starts
from the same weights.
"""

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.errors import ConfigError
from megalm.models.blocks.randomness import named_generator

Shape = tuple[int, ...]
Rule = Callable[[Shape, ModelConfig, torch.Generator], Tensor]


def initial_value(name: str, shape: Shape, config: ModelConfig, seed: int) -> Tensor:
    """The whole initial tensor of parameter `name`, float32 on CPU: a pure function of its arguments.

    `name` and `shape` are those of the one-device model (for vocabulary tables: with padding, whose rows are zero; the
    other rows do not depend on the padding). Linear and embedding weights are normal with standard deviation
    init_method_std, output projections of attention and MLP with init_method_std / sqrt(2 x num_layers) (GPT-2, Radford
    et al. 2019, section 2.3), or all of them are as init_method_xavier_uniform says; norms start as the identity,
    biases at zero.
    Raises ConfigError where the table of rules has no rule, or more than one, for `name`.
    """
    rules = [rule for pattern, rule in _RULES if re.fullmatch(pattern, name)]
    if len(rules) != 1:
        raise ConfigError(
            f"parameter {name} matches {len(rules)} rules of initial values and must match exactly one; "
            "add its pattern to the table in megalm/models/gpt/init.py"
        )
    return rules[0](tuple(shape), config, named_generator(seed, "init", name))


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Set every parameter of a whole (unsliced) model, in place, to its initial value, cast to its dtype.

    Raises ConfigError for parameters on the meta device and for names without a rule.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ConfigError(f"parameter {name} is on the meta device; call model.to_empty(device=...) first")
        parameter.copy_(initial_value(name, tuple(parameter.shape), config, seed))


def _normal(shape: Shape, config: ModelConfig, generator: torch.Generator, outputs: int | None = None) -> Tensor:
    """A matrix of the run's distribution; `outputs` are those of the matrix that it is part of in Megatron."""
    if config.init_method_xavier_uniform:
        bound = math.sqrt(6 / ((outputs or shape[0]) + shape[1]))
        return torch.rand(shape, generator=generator).mul_(2 * bound).sub_(bound)
    return torch.randn(shape, generator=generator).mul_(config.init_method_std)


def _query_key_value(shape: Shape, config: ModelConfig, generator: torch.Generator) -> Tensor:
    outputs = (config.num_attention_heads + 2 * config.num_kv_heads) * config.head_dim
    return _normal(shape, config, generator, outputs)


def _gate_up(shape: Shape, config: ModelConfig, generator: torch.Generator) -> Tensor:
    return _normal(shape, config, generator, config.ffn_size * (2 if config.swiglu else 1))


def _output_projection(shape: Shape, config: ModelConfig, generator: torch.Generator) -> Tensor:
    drawn = _normal(shape, config, generator)
    # Megatron's scaled_init_method is not scaled under xavier either
    return drawn if config.init_method_xavier_uniform else drawn.div_(math.sqrt(2 * config.num_layers))


def _vocabulary(shape: Shape, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """Rows past vocab_size are zero; the rows before are drawn alone, so that they do not depend on the padding."""
    assert config.vocab_size is not None, "vocab_size is filled from the tokenizer before the model is built"
    table = torch.zeros(shape)
    table[: config.vocab_size] = _normal((config.vocab_size, *shape[1:]), config, generator, config.padded_vocab_size())
    return table


def _norm_weight(shape: Shape, config: ModelConfig, generator: torch.Generator) -> Tensor:
    return torch.full(shape, 0.0 if config.apply_layernorm_1p else 1.0)


def _zeros(shape: Shape, config: ModelConfig, generator: torch.Generator) -> Tensor:
    return torch.zeros(shape)


_NORMS = r"(layers\.\d+\.((attention|mlp)(_output)?|attention\.[qk])|final)_norm"
# Patterns match the whole name; every parameter matches exactly one.
_RULES: tuple[tuple[str, Rule], ...] = (
    (r"embedding\.tokens\.weight", _vocabulary),
    (r"head\.weight", _vocabulary),
    (r"embedding\.positions\.weight", _normal),
    (r"layers\.\d+\.attention\.w[qkv]\.weight", _query_key_value),
    (r"layers\.\d+\.mlp\.w_(gate|up)\.weight", _gate_up),
    (r"layers\.\d+\.(attention\.wo|mlp\.w_down)\.weight", _output_projection),
    (r"layers\.\d+\.(attention\.w[qkvo]|mlp\.w_(gate|up|down))\.bias", _zeros),
    (rf"{_NORMS}\.weight", _norm_weight),
    (rf"{_NORMS}\.bias", _zeros),
)
