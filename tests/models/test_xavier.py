"""Xavier initialisation with the matrices that Megatron has: bounds by hand, at one device's padding."""

import math

import pytest

from megalm.config.model import ModelConfig
from megalm.models.gpt.init import initial_value

SIZES = {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 6, "num_query_groups": 2, "kv_channels": 16,
         "ffn_hidden_size": 80, "vocab_size": 100, "max_position_embeddings": 24}  # fmt: skip
# Megatron's matrices are (outputs, inputs): query, key and value (96 + 32 + 32, 48), output (48, 96), gate and up
# (160, 48), down (48, 80), the vocabulary padded to 128.
BOUNDS = {
    ("layers.0.attention.wq.weight", (96, 48)): 160 + 48,
    ("layers.1.attention.wk.weight", (32, 48)): 160 + 48,
    ("layers.1.attention.wo.weight", (48, 96)): 48 + 96,
    ("layers.0.mlp.w_gate.weight", (80, 48)): 160 + 48,
    ("layers.0.mlp.w_up.weight", (80, 48)): 160 + 48,
    ("layers.0.mlp.w_down.weight", (48, 80)): 48 + 80,
    ("embedding.tokens.weight", (128, 48)): 128 + 48,
    ("head.weight", (256, 48)): 128 + 48,  # padded for two tensor-parallel ranks: the values stay
    ("embedding.positions.weight", (24, 48)): 24 + 48,
}


@pytest.mark.parametrize(("name", "shape"), BOUNDS)
def test_values_fill_the_bounds_of_megatrons_matrices(name: str, shape: tuple[int, int]) -> None:
    config = ModelConfig(**SIZES, swiglu=True, init_method_xavier_uniform=True)
    value = initial_value(name, shape, config, seed=3)[:100]
    bound = math.sqrt(6 / BOUNDS[name, shape])
    assert float(value.abs().max()) <= bound
    assert float(value.abs().max()) > 0.99 * bound
    assert float(value.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert abs(float(value.mean())) < 0.05 * bound


def test_an_ungated_mlp_has_its_own_width() -> None:
    config = ModelConfig(**SIZES, init_method_xavier_uniform=True)
    value = initial_value("layers.0.mlp.w_up.weight", (80, 48), config, seed=3)
    assert float(value.abs().max()) == pytest.approx(math.sqrt(6 / (80 + 48)), rel=0.01)
