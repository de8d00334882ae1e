"""Parameters and floating-point operations of ELECTRA, from its configuration alone: of both networks together.

Counted on the meta device: parameters are those of the built model, and of operations only matrix products count,
each element of a weight matrix 2 a token (as in models/gpt/flops.py).
"""

import torch
from torch import nn

from megalm.config.generator import generator_of
from megalm.config.model import ModelConfig
from megalm.config.parallel import PartitionMethod
from megalm.models.bert.flops import elements, matrix_elements, score_flops
from megalm.models.contract import PartCosts
from megalm.models.electra.model import Electra


def num_parameters(config: ModelConfig, padded_vocab_size: int | None = None) -> int:
    """Parameters of the model that `Electra(config, padded_vocab_size)` builds."""
    return elements(_built(config, padded_vocab_size))


def training_flops_per_token(config: ModelConfig, seq_length: int, padded_vocab_size: int | None = None) -> int:
    """Operations of one token's forward and backward pass, three times the forward's, without recomputation."""
    model = _built(config, padded_vocab_size)
    return 3 * (sum(_layer_flops(config, model, seq_length)) + _end_flops(config, model))


def part_costs(config: ModelConfig, seq_length: int, method: PartitionMethod) -> PartCosts:
    """Parameters, or FLOPs of one token's forward pass; what lies between the networks counts as head."""
    model = _built(config, None)
    if method == "flops":
        layers = _layer_flops(config, model, seq_length)
        return PartCosts(embedding=0, layers=layers, head=_end_flops(config, model))
    layers = tuple(elements(layer) for layer in model.layers.values())
    embedding = elements(model.embedding)
    return PartCosts(embedding=embedding, layers=layers, head=elements(model) - embedding - sum(layers))


def _built(config: ModelConfig, rows: int | None) -> Electra:
    with torch.device("meta"):
        return Electra(config, rows)


def _layer_flops(config: ModelConfig, model: Electra, seq_length: int) -> tuple[int, ...]:
    """Of each layer, the generator's first."""
    found = []
    for name, layer in model.layers.items():
        own = generator_of(config) if int(name) < config.generator_layers else config
        scores = score_flops(own, int(name) % config.num_layers, seq_length)
        found.append(2 * matrix_elements(layer) + scores)
    return tuple(found)


def _end_flops(config: ModelConfig, model: Electra) -> int:
    """All but the layers, the product with a tied table included."""
    ends: list[nn.Module] = [model.projection, model.detector]
    tied = 0
    if config.generator_layers:
        ends.append(model.generator)
        tied = model.embedding.tokens.weight.numel() if config.tied else 0
    return 2 * (sum(map(matrix_elements, ends)) + tied)
