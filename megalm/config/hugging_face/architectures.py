"""The classes of transformers whose models megalm has.

To add one: an entry here, and its names of tensors in its family's `hugging_face.py` (`models/gpt`, `models/bert`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megalm.config.hugging_face.encoders import (
    BiasesByPart,
    HeadActivation,
    LocalAttention,
    PositionsAfterPadding,
)
from megalm.config.hugging_face.pieces import (
    Activations,
    Biases,
    Dropouts,
    FeedForward,
    HeadOfDecoder,
    Needs,
    Piece,
    Switch,
    Windows,
)
from megalm.config.hugging_face.rope import Rope, RopeByLayer

Sizes = Mapping[str, str]
_LLAMA_SIZES: Sizes = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "norm_epsilon": "rms_norm_eps",
    "attention_dropout": "attention_dropout",
    "init_method_std": "initializer_range",
}
_LLAMA_DEFAULTS = {
    "hidden_act": "silu",
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_theta": 10000.0},
}
_RMS_NORM = {"normalization": "RMSNorm"}
_TIED = Switch("tie_word_embeddings", "untie_embeddings_and_output_weights", opposite=True)
_SILU = Activations("hidden_act", gated=True)
_GEMMA = Activations("hidden_activation", gated=True)
_GEMMA_FIXED = {**_RMS_NORM, "apply_layernorm_1p": True, "norm_order": "sandwich", "scale_embeddings": True}
_GEMMA_SIZES = {
    **_LLAMA_SIZES,
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GEMMA_DEFAULTS = {
    **_LLAMA_DEFAULTS,
    "tie_word_embeddings": True,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}

_BERT_SIZES: Sizes = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "num_tokentypes": "type_vocab_size",
    "vocab_size": "vocab_size",
    "norm_epsilon": "layer_norm_eps",
    "attention_dropout": "attention_probs_dropout_prob",
    "init_method_std": "initializer_range",
}
_BERT_DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "tie_word_embeddings": True,
}
_BERT_FIXED = {"model_family": "bert", "norm_order": "post", "embedding_norm": True}
_BERT_PIECES: tuple[Piece, ...] = (
    Dropouts(("hidden_dropout_prob",)),
    Needs("is_decoder", False),
    Needs("add_cross_attention", False),
    Needs("position_embedding_type", "absolute"),
)
_ELECTRA_SIZES: Sizes = {**_BERT_SIZES, "embedding_size": "embedding_size"}
_ELECTRA_DEFAULTS = {
    **_BERT_DEFAULTS,
    "embedding_size": 128,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}
_ONLY_TIED = Needs("tie_word_embeddings", True)
_T5_SIZES: Sizes = {
    "num_layers": "num_layers",
    "decoder_num_layers": "num_decoder_layers",
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "kv_channels": "d_kv",
    "ffn_hidden_size": "d_ff",
    "relative_attention_num_buckets": "relative_attention_num_buckets",
    "relative_attention_max_distance": "relative_attention_max_distance",
    "vocab_size": "vocab_size",
    "norm_epsilon": "layer_norm_epsilon",
    "attention_dropout": "dropout_rate",
}
_T5_FIXED = {
    **_RMS_NORM,
    "model_family": "t5",
    "position_embedding_type": "relative",
    "disable_bias_linear": True,
}
_T5_DEFAULTS = {
    "num_layers": 6,
    "d_model": 512,
    "num_heads": 8,
    "d_kv": 64,
    "d_ff": 2048,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "vocab_size": 32128,
    "layer_norm_epsilon": 1e-6,
    "dropout_rate": 0.1,
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One class of transformers."""

    model_type: str
    sizes: Sizes
    """Field -> key: the same number under another name."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of every model of the class."""
    pieces: tuple[Piece, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What the class takes for keys that a config.json does not have."""
    head_and_embedding: tuple[str, str] | None = None
    """Tensors that are one only where the file has no head, or one of the same values, whatever config.json says."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "GPT2LMHeadModel": Architecture(
        model_type="gpt2",
        sizes={
            "num_layers": "n_layer",
            "hidden_size": "n_embd",
            "num_attention_heads": "n_head",
            "ffn_hidden_size": "n_inner",
            "max_position_embeddings": "n_positions",
            "vocab_size": "vocab_size",
            "norm_epsilon": "layer_norm_epsilon",
            "attention_dropout": "attn_pdrop",
            "init_method_std": "initializer_range",
        },
        pieces=(
            Activations("activation_function", gated=False),
            Dropouts(("resid_pdrop", "embd_pdrop")),
            _TIED,
            Needs("scale_attn_weights", True),
            Needs("scale_attn_by_inverse_layer_idx", False),
            Needs("add_cross_attention", False),
        ),
        defaults={
            "activation_function": "gelu_new",
            "n_layer": 12,
            "n_embd": 768,
            "n_head": 12,
            "n_positions": 1024,
            "vocab_size": 50257,
            "layer_norm_epsilon": 1e-5,
            "attn_pdrop": 0.1,
            "resid_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
        },
    ),
    "GPTNeoXForCausalLM": Architecture(
        model_type="gpt_neox",
        sizes={
            **{ours: key for ours, key in _LLAMA_SIZES.items() if ours not in ("num_query_groups", "kv_channels")},
            "norm_epsilon": "layer_norm_eps",
        },
        pieces=(
            Activations("hidden_act", gated=False),
            Dropouts(("hidden_dropout",)),
            _TIED,
            Switch("use_parallel_residual", "use_parallel_residual"),
            Rope("rotary_emb_base", "rotary_pct", partial=True),
            Needs("attention_bias", True),
        ),
        defaults={
            **_LLAMA_DEFAULTS,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "hidden_dropout": 0.0,
            "use_parallel_residual": True,
            "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        },
    ),
    "OPTForCausalLM": Architecture(
        model_type="opt",
        sizes={
            "num_layers": "num_hidden_layers",
            "hidden_size": "hidden_size",
            "num_attention_heads": "num_attention_heads",
            "ffn_hidden_size": "ffn_dim",
            "max_position_embeddings": "max_position_embeddings",
            "vocab_size": "vocab_size",
            "attention_dropout": "attention_dropout",
            "init_method_std": "init_std",
        },
        fixed={"position_embedding_offset": 2, "norm_epsilon": 1e-5},
        pieces=(
            Activations("activation_function", gated=False),
            Dropouts(("dropout",)),
            _TIED,
            Switch("enable_bias", "disable_bias_linear", opposite=True),
            Needs("do_layer_norm_before", True),
            Needs("_remove_final_layer_norm", False),
            Needs("layer_norm_elementwise_affine", True),
        ),
        defaults={
            "activation_function": "relu",
            "dropout": 0.1,
            "attention_dropout": 0.0,
            "init_std": 0.02,
            "enable_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "LlamaForCausalLM": Architecture(
        model_type="llama",
        sizes=_LLAMA_SIZES,
        fixed=_RMS_NORM,
        pieces=(_SILU, _TIED, Rope(), Biases("attention_bias", "mlp_bias")),
        defaults=_LLAMA_DEFAULTS,
    ),
    "MistralForCausalLM": Architecture(
        model_type="mistral",
        sizes=_LLAMA_SIZES,
        fixed={**_RMS_NORM, "disable_bias_linear": True},
        pieces=(_SILU, _TIED, Rope(), Windows(by_layer=False)),
        defaults={**_LLAMA_DEFAULTS, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "Qwen2ForCausalLM": Architecture(
        model_type="qwen2",
        sizes=_LLAMA_SIZES,
        fixed={**_RMS_NORM, "disable_bias_linear": True, "add_qkv_bias": True},
        pieces=(_SILU, _TIED, Rope(), Windows(by_layer=True, switch="use_sliding_window")),
        defaults={**_LLAMA_DEFAULTS, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    ),
    "Qwen3ForCausalLM": Architecture(
        model_type="qwen3",
        sizes=_LLAMA_SIZES,
        fixed={**_RMS_NORM, "qk_layernorm": True},
        pieces=(
            _SILU,
            _TIED,
            Rope(),
            Biases("attention_bias", None),
            Windows(by_layer=True, switch="use_sliding_window"),
        ),
        defaults={
            **_LLAMA_DEFAULTS,
            "head_dim": 128,
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
    "Gemma2ForCausalLM": Architecture(
        model_type="gemma2",
        sizes={**_GEMMA_SIZES, "attn_logit_softcapping": "attn_logit_softcapping"},
        fixed=_GEMMA_FIXED,
        pieces=(_GEMMA, _TIED, Rope(), Biases("attention_bias", None), Windows(by_layer=True, every=2)),
        defaults={
            **_GEMMA_DEFAULTS,
            "num_key_value_heads": 4,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
    ),
    "Gemma3ForCausalLM": Architecture(
        model_type="gemma3_text",
        sizes=_GEMMA_SIZES,
        fixed={**_GEMMA_FIXED, "qk_layernorm": True},
        pieces=(
            _GEMMA,
            _TIED,
            RopeByLayer(),
            Biases("attention_bias", None),
            Windows(by_layer=True, every=6),
            Needs("attn_logit_softcapping", None),
            Needs("use_bidirectional_attention", False),
        ),
        defaults={**_GEMMA_DEFAULTS, "num_key_value_heads": 4},
    ),
    "Olmo2ForCausalLM": Architecture(
        model_type="olmo2",
        sizes=_LLAMA_SIZES,
        fixed={**_RMS_NORM, "norm_order": "branch", "qk_layernorm": True, "qk_layernorm_full_width": True},
        pieces=(_SILU, _TIED, Rope(), Biases("attention_bias", None)),
        defaults={**_LLAMA_DEFAULTS, "rms_norm_eps": 1e-5},
    ),
    "Phi3ForCausalLM": Architecture(
        model_type="phi3",
        sizes=_LLAMA_SIZES,
        fixed={**_RMS_NORM, "disable_bias_linear": True},
        pieces=(
            _SILU,
            _TIED,
            Rope(partial=True),
            Dropouts(("resid_pdrop", "embd_pdrop")),
            Windows(by_layer=False),
        ),
        defaults={**_LLAMA_DEFAULTS, "rms_norm_eps": 1e-5, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    ),
    "BertForMaskedLM": Architecture(
        model_type="bert",
        sizes=_BERT_SIZES,
        fixed={**_BERT_FIXED, "bert_no_binary_head": True},
        pieces=(*_BERT_PIECES, Activations("hidden_act", gated=False), _ONLY_TIED),
        defaults=_BERT_DEFAULTS,
    ),
    "BertForPreTraining": Architecture(
        model_type="bert",
        sizes=_BERT_SIZES,
        fixed=_BERT_FIXED,
        pieces=(*_BERT_PIECES, Activations("hidden_act", gated=False), _ONLY_TIED),
        defaults=_BERT_DEFAULTS,
    ),
    "RobertaForMaskedLM": Architecture(
        model_type="roberta",
        sizes={ours: key for ours, key in _BERT_SIZES.items() if ours != "max_position_embeddings"},
        fixed={**_BERT_FIXED, "bert_no_binary_head": True},
        pieces=(*_BERT_PIECES, Needs("hidden_act", "gelu"), _ONLY_TIED, PositionsAfterPadding()),
        defaults={**_BERT_DEFAULTS, "vocab_size": 50265, "pad_token_id": 1},
    ),
    "ElectraForMaskedLM": Architecture(
        model_type="electra",
        sizes=_ELECTRA_SIZES,
        fixed={**_BERT_FIXED, "bert_no_binary_head": True},
        pieces=(*_BERT_PIECES, Needs("hidden_act", "gelu"), _TIED),
        defaults=_ELECTRA_DEFAULTS,
    ),
    "ElectraForPreTraining": Architecture(
        model_type="electra",
        sizes=_ELECTRA_SIZES,
        fixed={**_BERT_FIXED, "model_family": "electra", "rtd_generator_size": 0.0},
        pieces=(*_BERT_PIECES, Activations("hidden_act", gated=False)),
        defaults=_ELECTRA_DEFAULTS,
    ),
    "ModernBertForMaskedLM": Architecture(
        model_type="modernbert",
        sizes={
            "num_layers": "num_hidden_layers",
            "hidden_size": "hidden_size",
            "num_attention_heads": "num_attention_heads",
            "ffn_hidden_size": "intermediate_size",
            "max_position_embeddings": "max_position_embeddings",
            "vocab_size": "vocab_size",
            "norm_epsilon": "norm_eps",
            "attention_dropout": "attention_dropout",
            "init_method_std": "initializer_range",
        },
        fixed={
            "model_family": "bert",
            "norm_order": "pre",
            "embedding_norm": True,
            "num_tokentypes": 0,
            "bert_no_binary_head": True,
        },
        pieces=(
            Activations("hidden_activation", gated=True),
            HeadActivation("classifier_activation", "hidden_activation"),
            Dropouts(("embedding_dropout", "mlp_dropout")),
            BiasesByPart(),
            LocalAttention(),
            RopeByLayer("global_rope_theta", "local_rope_theta", 160000.0),
            Needs("decoder_bias", True),
            _TIED,
        ),
        defaults={
            "vocab_size": 50368,
            "hidden_size": 768,
            "intermediate_size": 1152,
            "num_hidden_layers": 22,
            "num_attention_heads": 12,
            "hidden_activation": "gelu",
            "classifier_activation": "gelu",
            "max_position_embeddings": 8192,
            "initializer_range": 0.02,
            "norm_eps": 1e-5,
            "attention_dropout": 0.0,
            "local_attention": 128,
            "global_attn_every_n_layers": 3,
            "decoder_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "T5ForConditionalGeneration": Architecture(
        model_type="t5",
        sizes=_T5_SIZES,
        fixed=_T5_FIXED,
        pieces=(
            FeedForward(),
            Dropouts(("dropout_rate",)),
            HeadOfDecoder(scaled="scale_decoder_outputs"),
            Needs("is_encoder_decoder", True),
        ),
        defaults=_T5_DEFAULTS,
        head_and_embedding=("lm_head.weight", "shared.weight"),
    ),
    "MT5ForConditionalGeneration": Architecture(
        model_type="mt5",
        sizes=_T5_SIZES,
        fixed=_T5_FIXED,
        pieces=(
            FeedForward(),
            Dropouts(("dropout_rate",)),
            HeadOfDecoder(scaled=None),
            Needs("is_encoder_decoder", True),
        ),
        defaults={
            **_T5_DEFAULTS,
            "num_layers": 8,
            "num_heads": 6,
            "d_ff": 1024,
            "vocab_size": 250112,
            "feed_forward_proj": "gated-gelu",
        },
        head_and_embedding=("lm_head.weight", "shared.weight"),
    ),
}
