"""The same weights give the same logits as Hugging Face's GPT-2, Llama, Qwen3 and GPT-NeoX, in float32."""

import pytest
import torch
import transformers

from megalm.testing.batches import logits, token_losses

SIZES = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 72, "max_position_embeddings": 24}
LLAMA_NAMES = {
    "embed_tokens": "embedding.tokens",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    **{f"self_attn.{old}_proj": f"attention.w{old}" for old in "qkvo"},
    **{f"self_attn.{old}_norm": f"attention.{old}_norm" for old in "qk"},
    **{f"mlp.{old}_proj": f"mlp.w_{old}" for old in ("gate", "up", "down")},
}
GPT2_NAMES = {
    "wte": "embedding.tokens",
    "wpe": "embedding.positions",
    "h.": "layers.",
    "ln_1": "attention_norm",
    "ln_2": "mlp_norm",
    "ln_f": "final_norm",
    "attn.c_attn": "attention.wqkv",
    "attn.c_proj": "attention.wo",
    "c_fc": "w_up",
    "mlp.c_proj": "mlp.w_down",
}
NEOX_NAMES = {
    "embed_in": "embedding.tokens",
    "embed_out": "head",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "final_layer_norm": "final_norm",
    "attention.query_key_value": "attention.wqkv",
    "attention.dense": "attention.wo",
    "dense_h_to_4h": "w_up",
    "dense_4h_to_h": "w_down",
}


def randomize(hf_model):
    """Random values everywhere, biases and norms too, large enough that every term counts."""
    for parameter in hf_model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.2)
    return hf_model.eval()


def renamed(hf_model, names):
    state = {}
    for name, tensor in hf_model.named_parameters():
        name = name.removeprefix("model.").removeprefix("transformer.").removeprefix("gpt_neox.")
        for old, new in names.items():
            name = name.replace(old, new)
        name = "final_norm.weight" if name == "norm.weight" else name.replace("lm_head", "head")
        state[name] = tensor.detach()
    return state


def split_qkv(state, split):
    for name in [name for name in state if "wqkv" in name]:
        for letter, part in zip("qkv", split(state.pop(name)), strict=True):
            state[name.replace("wqkv", f"w{letter}")] = part
    return state


def assert_same_logits(hf_model, model, state):
    model.load_state_dict(state)
    tokens = torch.randint(0, 100, (2, 19))
    labels = tokens.roll(-1, 1)
    expected = hf_model(tokens).logits
    torch.testing.assert_close(logits(model, tokens)[..., :100], expected, rtol=1e-5, atol=1e-5)
    losses = torch.nn.functional.cross_entropy(expected.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(token_losses(model, tokens, labels), losses, rtol=1e-5, atol=1e-5)


def test_gpt2_logits_are_equal(config_of, build):
    hf_config = transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=24, n_inner=72)
    hf_model = randomize(transformers.GPT2LMHeadModel(hf_config))
    state = renamed(hf_model, GPT2_NAMES)
    for name in state:  # GPT-2's Conv1D keeps its matrices transposed
        if "layers" in name and state[name].dim() == 2:
            state[name] = state[name].T
    state = split_qkv(state, lambda tensor: tensor.chunk(3))
    assert_same_logits(hf_model, build(config_of("gpt2"), padded_vocab_size=100), state)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("interpolation", [1.0, 2.0])
def test_llama_logits_are_equal(config_of, build, tied, interpolation):
    rope = {"rope_type": "linear", "factor": interpolation, "rope_theta": 500.0}
    hf_config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=2, tie_word_embeddings=tied, rope_parameters=rope, rms_norm_eps=1e-4
    )
    hf_model = randomize(transformers.LlamaForCausalLM(hf_config))
    changes = {"rotary_base": 500.0, "rotary_seq_len_interpolation_factor": interpolation, "norm_epsilon": 1e-4}
    config = config_of("llama", untie_embeddings_and_output_weights=not tied, **changes)
    assert_same_logits(hf_model, build(config, padded_vocab_size=100), renamed(hf_model, LLAMA_NAMES))


def test_qwen3_logits_are_equal(config_of, build):
    hf_config = transformers.Qwen3Config(
        **SIZES, num_key_value_heads=2, head_dim=10, attention_bias=False, tie_word_embeddings=True, rms_norm_eps=1e-5
    )
    hf_model = randomize(transformers.Qwen3ForCausalLM(hf_config))
    config = config_of("qwen", kv_channels=10, add_qkv_bias=False)
    assert_same_logits(hf_model, build(config, padded_vocab_size=100), renamed(hf_model, LLAMA_NAMES))


def test_gpt_neox_logits_with_partial_rotary_are_equal(config_of, build):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    hf_config = transformers.GPTNeoXConfig(**SIZES, use_parallel_residual=False, rope_parameters=rope)
    hf_model = randomize(transformers.GPTNeoXForCausalLM(hf_config))
    # Rows of NeoX's query_key_value are (head, q/k/v, channel).
    state = split_qkv(
        renamed(hf_model, NEOX_NAMES),
        lambda t: t.view(4, 3, 8, *t.shape[1:]).transpose(0, 1).reshape(3, 32, *t.shape[1:]),
    )
    assert_same_logits(hf_model, build(config_of("neox"), padded_vocab_size=100), state)
