"""Small models of transformers' decoders: for each class a hypothesis strategy of its configurations."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from hypothesis import strategies as st
from safetensors.torch import load_file

from megalm.checkpoint.hugging_face import export_model, import_model
from megalm.checkpoint.reader import CheckpointReader

VOCAB = 99
ROPES = (
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
)


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes under Llama's names, with odd ones, and grouped heads."""
    groups, repeats = draw(st.sampled_from([(1, 1), (1, 4), (2, 2), (3, 1)]))
    head_dim = draw(st.sampled_from([4, 6, 10]))
    return {
        "vocab_size": VOCAB,
        "num_hidden_layers": draw(st.sampled_from([2, 3])),
        "num_attention_heads": groups * repeats,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "hidden_size": draw(st.sampled_from([24, 36])),
        "intermediate_size": draw(st.sampled_from([40, 17])),
        "max_position_embeddings": 48,
        "tie_word_embeddings": draw(st.booleans()),
    }


@st.composite
def one_width(draw: st.DrawFn) -> dict[str, Any]:
    """The same for classes without grouped heads: their heads fill the width."""
    values = draw(sizes())
    heads = draw(st.sampled_from([2, 3, 6]))
    del values["num_key_value_heads"], values["head_dim"]
    return values | {"num_attention_heads": heads, "hidden_size": 24}


def rms(draw: st.DrawFn) -> dict[str, Any]:
    return {"rms_norm_eps": draw(st.sampled_from([1e-6, 1e-4]))}


def ropes(draw: st.DrawFn) -> dict[str, Any]:
    return {"rope_parameters": dict(draw(st.sampled_from(ROPES)))}


@st.composite
def gpt2(draw: st.DrawFn) -> Any:
    v = draw(one_width())
    return transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=v["hidden_size"],
        n_layer=v["num_hidden_layers"],
        n_head=v["num_attention_heads"],
        n_positions=48,
        n_inner=draw(st.sampled_from([None, 40])),
        activation_function=draw(st.sampled_from(["gelu_new", "gelu", "relu"])),
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 1e-3])),
        tie_word_embeddings=v["tie_word_embeddings"],
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )


@st.composite
def gpt_neox(draw: st.DrawFn) -> Any:
    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": draw(st.sampled_from([0.5, 1.0]))}
    parallel = draw(st.booleans())
    act, eps = draw(st.sampled_from(["gelu", "gelu_new", "relu"])), draw(st.sampled_from([1e-5, 1e-3]))
    return transformers.GPTNeoXConfig(
        **draw(one_width()),
        rope_parameters=rope,
        use_parallel_residual=parallel,
        hidden_act=act,
        layer_norm_eps=eps,
    )


@st.composite
def opt(draw: st.DrawFn) -> Any:
    v = draw(one_width())
    width = v["hidden_size"]
    values = v | {"ffn_dim": v.pop("intermediate_size"), "word_embed_proj_dim": width, "dropout": 0.0}
    return transformers.OPTConfig(**values, activation_function=draw(st.sampled_from(["relu", "gelu"])))


@st.composite
def llama(draw: st.DrawFn) -> Any:
    bias = draw(st.booleans())
    rope = dict(draw(st.sampled_from(ROPES)))
    mlp_bias = bias and draw(st.booleans())
    return transformers.LlamaConfig(
        **draw(sizes()), **rms(draw), attention_bias=bias, mlp_bias=mlp_bias, rope_parameters=rope
    )


@st.composite
def mistral(draw: st.DrawFn) -> Any:
    window = draw(st.sampled_from([None, 1, 5, 40]))
    return transformers.MistralConfig(**draw(sizes()), **rms(draw), **ropes(draw), sliding_window=window)


@st.composite
def qwen2(draw: st.DrawFn) -> Any:
    v = draw(sizes())
    v |= {"num_attention_heads": 4, "num_key_value_heads": draw(st.sampled_from([1, 2, 4])), "hidden_size": 24}
    del v["head_dim"]
    windows = {"use_sliding_window": draw(st.booleans()), "sliding_window": 5, "max_window_layers": 1}
    return transformers.Qwen2Config(**v, **rms(draw), **ropes(draw), **windows)


@st.composite
def qwen3(draw: st.DrawFn) -> Any:
    windows = {"use_sliding_window": draw(st.booleans()), "sliding_window": 5, "max_window_layers": 1}
    return transformers.Qwen3Config(
        **draw(sizes()), **rms(draw), **ropes(draw), **windows, attention_bias=draw(st.booleans())
    )


@st.composite
def gemma2(draw: st.DrawFn) -> Any:
    caps = {
        "attn_logit_softcapping": draw(st.sampled_from([None, 5.0])),
        "final_logit_softcapping": draw(st.sampled_from([None, 3.0])),
    }
    scalar = draw(st.sampled_from([4, 17]))
    return transformers.Gemma2Config(
        **draw(sizes()), **rms(draw), **caps, query_pre_attn_scalar=scalar, sliding_window=6
    )


@st.composite
def gemma3(draw: st.DrawFn) -> Any:
    layers = draw(st.sampled_from([["sliding_attention", "full_attention"], ["full_attention"] * 2]))
    v = draw(sizes()) | {"num_hidden_layers": 2}
    return transformers.Gemma3TextConfig(
        **v,
        **rms(draw),
        layer_types=layers,
        sliding_window=6,
        final_logit_softcapping=draw(st.sampled_from([None, 3.0])),
    )


@st.composite
def olmo2(draw: st.DrawFn) -> Any:
    v = draw(one_width())
    groups = draw(st.sampled_from([1, v["num_attention_heads"]]))
    return transformers.Olmo2Config(**v, **rms(draw), **ropes(draw), num_key_value_heads=groups)


@st.composite
def phi3(draw: st.DrawFn) -> Any:
    v = draw(one_width())
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": draw(st.sampled_from([0.5, 1.0]))}
    window = draw(st.sampled_from([None, 5]))
    return transformers.Phi3Config(
        **v, num_key_value_heads=2 if v["num_attention_heads"] != 3 else 3, rope_parameters=rope, sliding_window=window,
        pad_token_id=0,
    )  # fmt: skip


CLASSES: dict[str, Callable[[], st.SearchStrategy[Any]]] = {
    "GPT2LMHeadModel": gpt2,
    "GPTNeoXForCausalLM": gpt_neox,
    "OPTForCausalLM": opt,
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "Gemma2ForCausalLM": gemma2,
    "Gemma3ForCausalLM": gemma3,
    "Olmo2ForCausalLM": olmo2,
    "Phi3ForCausalLM": phi3,
}


def random_model(config: Any, seed: int = 0) -> Any:
    """A model whose weights are all random, biases and norms too, large enough that every term counts."""
    torch.manual_seed(seed)
    # sdpa has no soft-capping
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.2)
    return model.eval()


def check_round_trip(theirs: Any) -> None:
    """A run made of the folder of their model, and a folder of that: the same names and bytes."""
    with tempfile.TemporaryDirectory() as name:
        there, run, back = (Path(name) / step for step in ("there", "run", "back"))
        theirs.save_pretrained(there)
        import_model(there, run)
        export_model(CheckpointReader(run / "step_0"), back)
        before, after = (load_file(folder / "model.safetensors") for folder in (there, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
