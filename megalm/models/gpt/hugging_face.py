"""The tensors of transformers' decoders and those of `GPT`, by class: one table each, used in both directions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megalm.config.model import ModelConfig
from megalm.models.foreign import STACKED, TRANSPOSED, ByHead, ForeignTensor, Layout

_PLAIN_ATTENTION = {f"self_attn.{letter}_proj": (f"attention.w{letter}",) for letter in "qkv"}
_QK_NORMS = {f"self_attn.{letter}_norm": (f"attention.{letter}_norm",) for letter in "qk"}
_GATED_MLP = {f"mlp.{name}_proj": (f"mlp.w_{name}",) for name in ("gate", "up", "down")}
_PRE_NORMS = {"input_layernorm": ("attention_norm",), "post_attention_layernorm": ("mlp_norm",)}
_LLAMA_LAYER = {**_PLAIN_ATTENTION, "self_attn.o_proj": ("attention.wo",), **_QK_NORMS, **_GATED_MLP}

Modules = Mapping[str, tuple[str, ...]]
"""Module of transformers -> modules of ours that make it up, for weights and biases alike."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """How a class of transformers calls its tensors."""

    prefix: str = "model"
    """What all names but the head's begin with; files of the model without its head lack it."""
    layer: str = "layers"
    outside: Modules
    """Embeddings and last norm."""
    inside: Modules
    """Modules of a layer."""
    head: str = "lm_head"
    layout: Callable[[str, ModelConfig], Layout] = lambda name, config: STACKED
    """How a tensor lies in the file."""
    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    """Patterns of tensors that are no parameters (old versions wrote masks and frequencies too)."""

    def tensors(self, config: ModelConfig) -> list[ForeignTensor]:
        """Every tensor that a model of the class may have."""
        found = [
            tensor
            for name, ours in self.outside.items()
            for tensor in _weight_and_bias(f"{self.prefix}.{name}", ours, config, self.layout)
        ]
        for name, ours in self.inside.items():
            inner = tuple(f"layers.{{n}}.{own}" for own in ours)
            pattern = f"{self.prefix}.{self.layer}.{{n}}.{name}"
            for tensor in _weight_and_bias(pattern, inner, config, self.layout):
                found += [tensor.of_layer(number) for number in range(config.num_layers)]
        return [*found, ForeignTensor(f"{self.head}.weight", ("head.weight",))]


def _weight_and_bias(
    name: str, ours: tuple[str, ...], config: ModelConfig, layout: Callable[[str, ModelConfig], Layout]
) -> list[ForeignTensor]:
    return [
        ForeignTensor(full, tuple(f"{own}.{kind}" for own in ours), layout(full, config))
        for kind in ("weight", "bias")
        for full in [f"{name}.{kind}"]
    ]


def _gpt2_layout(name: str, config: ModelConfig) -> Layout:
    return TRANSPOSED if ".c_" in name else STACKED


def _neox_layout(name: str, config: ModelConfig) -> Layout:
    return ByHead(config.head_dim) if "query_key_value" in name else STACKED


_LLAMA_OUTSIDE = {"embed_tokens": ("embedding.tokens",), "norm": ("final_norm",)}
_LLAMA = Names(outside=_LLAMA_OUTSIDE, inside={**_LLAMA_LAYER, **_PRE_NORMS})
_GEMMA = Names(
    outside=_LLAMA_OUTSIDE,
    inside={
        **_LLAMA_LAYER,
        "input_layernorm": ("attention_norm",),
        "post_attention_layernorm": ("attention_output_norm",),
        "pre_feedforward_layernorm": ("mlp_norm",),
        "post_feedforward_layernorm": ("mlp_output_norm",),
    },
)

NAMES: Mapping[str, Names] = {
    "GPT2LMHeadModel": Names(
        prefix="transformer",
        layer="h",
        outside={"wte": ("embedding.tokens",), "wpe": ("embedding.positions",), "ln_f": ("final_norm",)},
        inside={
            "ln_1": ("attention_norm",),
            "attn.c_attn": ("attention.wq", "attention.wk", "attention.wv"),
            "attn.c_proj": ("attention.wo",),
            "ln_2": ("mlp_norm",),
            "mlp.c_fc": ("mlp.w_up",),
            "mlp.c_proj": ("mlp.w_down",),
        },
        layout=_gpt2_layout,
        ignored=(r".*\.attn\.(masked_)?bias",),
    ),
    "GPTNeoXForCausalLM": Names(
        prefix="gpt_neox",
        outside={"embed_in": ("embedding.tokens",), "final_layer_norm": ("final_norm",)},
        inside={
            **_PRE_NORMS,
            "attention.query_key_value": ("attention.wq", "attention.wk", "attention.wv"),
            "attention.dense": ("attention.wo",),
            "mlp.dense_h_to_4h": ("mlp.w_up",),
            "mlp.dense_4h_to_h": ("mlp.w_down",),
        },
        head="embed_out",
        layout=_neox_layout,
        ignored=(r".*\.attention\.(masked_)?bias", r".*rotary_emb\.inv_freq"),
    ),
    "OPTForCausalLM": Names(
        prefix="model.decoder",
        outside={
            "embed_tokens": ("embedding.tokens",),
            "embed_positions": ("embedding.positions",),
            "final_layer_norm": ("final_norm",),
        },
        inside={
            **_PLAIN_ATTENTION,
            "self_attn.out_proj": ("attention.wo",),
            "self_attn_layer_norm": ("attention_norm",),
            "fc1": ("mlp.w_up",),
            "fc2": ("mlp.w_down",),
            "final_layer_norm": ("mlp_norm",),
        },
    ),
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "Gemma2ForCausalLM": _GEMMA,
    "Gemma3ForCausalLM": _GEMMA,
    "Olmo2ForCausalLM": Names(
        outside=_LLAMA_OUTSIDE,
        inside={
            **_LLAMA_LAYER,
            "post_attention_layernorm": ("attention_output_norm",),
            "post_feedforward_layernorm": ("mlp_output_norm",),
        },
    ),
    "Phi3ForCausalLM": Names(
        outside=_LLAMA_OUTSIDE,
        inside={
            **_PRE_NORMS,
            "self_attn.qkv_proj": ("attention.wq", "attention.wk", "attention.wv"),
            "self_attn.o_proj": ("attention.wo",),
            "mlp.gate_up_proj": ("mlp.w_gate", "mlp.w_up"),
            "mlp.down_proj": ("mlp.w_down",),
        },
    ),
}
"""Class of transformers -> its names."""
