"""Initial values of T5, which make up for scores without a scale; they do not depend on the layout.

Source: Mesh TensorFlow's transformer as T5 trains it; Raffel et al. 2020, arXiv:1910.10683.
"""

import re

import torch
from torch import Tensor

from megalm.config.model import ModelConfig
from megalm.models.blocks.randomness import named_generator

_LAYER = r"layers\.\d+\."
_ATTENTION = rf"{_LAYER}(cross_)?attention\."


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """The whole initial tensor of parameter `name`, float32 on CPU: a pure function of its arguments.

    Matrices are normal, norms start as the identity. Rows of a vocabulary's padding are zero, and the other rows do not
    depend on them.
    """
    if re.fullmatch(rf"({_LAYER}(attention|cross_attention|mlp)|encoder|final)_norm\.weight", name):
        return torch.ones(shape)
    generator = named_generator(seed, "init", name)
    deviation = _deviation(name, config)
    if name not in ("embedding.tokens.weight", "head.weight"):
        return torch.randn(shape, generator=generator) * deviation
    assert config.vocab_size is not None, "vocab_size is filled from the tokenizer before the model is built"
    table = torch.zeros(shape)
    table[: config.vocab_size] = torch.randn((config.vocab_size, *shape[1:]), generator=generator) * deviation
    return table


def _deviation(name: str, config: ModelConfig) -> float:
    """Standard deviation of the values of a matrix."""
    width, inner = config.hidden_size, config.num_attention_heads * config.head_dim
    deviations: dict[str, float] = {
        r"embedding\.tokens\.weight": 1.0,
        r"head\.weight": width**-0.5,  # what it reads is not scaled
        r"positions\.(encoder|decoder)": width**-0.5,
        rf"{_ATTENTION}wq\.weight": (width * config.head_dim) ** -0.5,
        rf"{_ATTENTION}w[kv]\.weight": width**-0.5,
        rf"{_ATTENTION}wo\.weight": inner**-0.5,
        rf"{_LAYER}mlp\.w_(gate|up)\.weight": width**-0.5,
        rf"{_LAYER}mlp\.w_down\.weight": config.ffn_size**-0.5,
    }
    found = [value for pattern, value in deviations.items() if re.fullmatch(pattern, name)]
    assert len(found) == 1, f"parameter {name} has one rule of initial values, not {len(found)}"
    return found[0]
