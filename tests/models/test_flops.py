"""Parameter and operation counts against the real model and torch's own counter."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megalm.config.model import ModelConfig
from megalm.models.gpt.flops import forward_flops_per_token, num_parameters, training_flops_per_token
from megalm.models.gpt.model import GPT
from megalm.testing.batches import token_losses


@st.composite
def configs(draw):
    groups, heads_of_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    activation = draw(st.sampled_from([{}, {"swiglu": True}, {"squared_relu": True}, {"openai_gelu": True}]))
    norm = draw(st.sampled_from([{}, {"normalization": "RMSNorm"}, {"apply_layernorm_1p": True}]))
    flags = ("qk_layernorm", "disable_bias_linear", "add_qkv_bias", "untie_embeddings_and_output_weights")
    return ModelConfig(
        num_layers=draw(st.integers(1, 3)),
        hidden_size=draw(st.integers(1, 20)),
        num_attention_heads=groups * heads_of_group,
        num_query_groups=groups,
        kv_channels=2 * draw(st.integers(1, 4)),
        ffn_hidden_size=draw(st.none() | st.integers(1, 40)),
        vocab_size=draw(st.integers(1, 300)),
        max_position_embeddings=draw(st.integers(1, 20)),
        position_embedding_type=draw(st.sampled_from(["learned_absolute", "rope", "none"])),
        **{flag: draw(st.booleans()) for flag in flags},
        **activation,
        **norm,
    )


@settings(max_examples=100, deadline=None)
@given(configs(), st.sampled_from([None, 0, 5]), st.integers(0, 2))
def test_parameter_count_equals_the_built_model(config, padding, ahead):
    config = config.model_copy(update={"mtp_num_layers": ahead})
    rows = None if padding is None else config.vocab_size + padding
    with torch.device("meta"):
        model = GPT(config, rows)
    count = num_parameters(config, rows)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    names = ("embedding.", "head.")
    in_tables = sum(p.numel() for name, p in model.named_parameters() if name.startswith(names))
    assert (count.embedding, count.non_embedding) == (in_tables, count.total - in_tables)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(configs(), st.integers(2, 9))
def test_operations_equal_those_that_torch_counts(config, length):
    length = min(length, config.max_position_embeddings)
    model = GPT(config)
    tokens = torch.zeros(2, length, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        loss = token_losses(model, tokens, tokens).sum()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        loss.backward()
    # The unfused product computes every score, so the counter sees the count without the causal halving.
    forward_flops = 2 * length * forward_flops_per_token(config, length, causal=False)
    assert forward.get_total_flops() == forward_flops
    total = forward.get_total_flops() + backward.get_total_flops()
    assert total == 2 * length * training_flops_per_token(config, length, causal=False)


def test_causal_count_is_that_of_the_visible_pairs(config_of):
    config, length = config_of("llama"), 24
    pairs_all, pairs_visible = length * length, length * (length + 1) // 2
    saved = 4 * config.num_layers * config.num_attention_heads * config.head_dim * (pairs_all - pairs_visible)
    counts = [length * forward_flops_per_token(config, length, causal=causal) for causal in (False, True)]
    assert counts[0] - counts[1] == saved


PUBLISHED = {
    # Hugging Face: openai-community/gpt2, meta-llama/Llama-2-7b, meta-llama/Meta-Llama-3-8B
    124_439_808: {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "vocab_size": 50257},
    6_738_415_616: {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 32000}
    | {"ffn_hidden_size": 11008, "position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True}
    | {"disable_bias_linear": True, "untie_embeddings_and_output_weights": True},
    8_030_261_248: {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 128256}
    | {"ffn_hidden_size": 14336, "position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True}
    | {"disable_bias_linear": True, "untie_embeddings_and_output_weights": True, "num_query_groups": 8},
}


@pytest.mark.parametrize("parameters", PUBLISHED)
def test_published_models_have_their_published_number_of_parameters(parameters):
    config = ModelConfig.model_validate(PUBLISHED[parameters] | {"max_position_embeddings": 1024})
    assert num_parameters(config, config.vocab_size).total == parameters
