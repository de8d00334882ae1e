"""Small configurations and models that the tests of `megalm.models` share."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from megalm.config.model import ModelConfig
from megalm.models.gpt.init import initialize
from megalm.models.gpt.model import GPT

GPT2_STYLE = {"openai_gelu": True}
LLAMA_STYLE = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
    "num_query_groups": 2,
}
STYLES = {
    "gpt2": GPT2_STYLE,
    "llama": LLAMA_STYLE,
    "qwen": LLAMA_STYLE | {"add_qkv_bias": True, "qk_layernorm": True, "untie_embeddings_and_output_weights": False},
    "neox": {"position_embedding_type": "rope", "rotary_percent": 0.5, "untie_embeddings_and_output_weights": True},
    "nemotron": {
        "position_embedding_type": "none",
        "squared_relu": True,
        "apply_layernorm_1p": True,
        "num_query_groups": 1,
        "kv_channels": 6,
    },
}


def small_config(**changes: object) -> ModelConfig:
    """Two layers of width 32; not one size equals another, so that a mixed-up dim shows."""
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 100, "ffn_hidden_size": 72}
    limits = {"max_position_embeddings": 24, "make_vocab_size_divisible_by": 16}
    return ModelConfig.model_validate(sizes | limits | changes)


def build_model(config: ModelConfig, seed: int = 1, **arguments: object) -> GPT:
    """A model with its initial values, larger than usual so that rounding does not hide differences."""
    model = GPT(config, **arguments)
    initialize(model, config.model_copy(update={"init_method_std": 0.2}), seed)
    return model


@pytest.fixture(params=STYLES)
def style_config(request: pytest.FixtureRequest) -> ModelConfig:
    return small_config(**STYLES[request.param])


@pytest.fixture
def config_of() -> Callable[..., ModelConfig]:
    return lambda style="gpt2", **changes: small_config(**(STYLES[style] | changes))


@pytest.fixture
def build() -> Callable[..., GPT]:
    return build_model


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small model of a class of transformers, written once."""
    from decoders import CLASSES, random_model
    from hypothesis import find

    @cache
    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        random_model(find(CLASSES[name](), lambda config: True)).save_pretrained(folder)
        return folder

    return write
