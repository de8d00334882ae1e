"""Rules of encoder-decoders: what T5 has and has not, and the lengths that its objectives need."""

from collections.abc import Mapping
from typing import Any

from megalm.config.rules.objective import FAMILY_OF, OBJECTIVES_OF
from megalm.config.sections import RunConfig
from megalm.config.spans import decoder_seq_length, denoisings

T5_HAS: Mapping[str, Any] = {
    "position_embedding_type": "relative",
    "normalization": "RMSNorm",
    "disable_bias_linear": True,
}
"""What a T5 must be given: no default says it."""
T5_LACKS: tuple[str, ...] = (
    *("norm_order", "use_parallel_residual", "apply_layernorm_1p", "qk_layernorm", "add_qkv_bias"),
    *("add_attention_output_bias", "scale_embeddings", "window_size", "query_pre_attn_scalar"),
    *("num_tokentypes", "embedding_norm", "embedding_size", "bert_no_binary_head"),
    *("attn_logit_softcapping", "final_logit_softcapping", "init_method_std", "init_method_xavier_uniform"),
)
"""Settings of other families that a T5 has not; they keep their defaults."""
DECODER_ONLY: tuple[str, ...] = ("decoder_num_layers", "decoder_seq_length", "scale_decoder_outputs")
"""Settings of encoder-decoders."""


def encoder_decoder(config: RunConfig) -> list[str]:
    """What an encoder-decoder needs, and what others have not."""
    model = config.model
    if not model.encoder_decoder:
        return _of_encoder_decoders_only(config)
    return _t5_variant(config) + _t5_run(config)


def _of_encoder_decoders_only(config: RunConfig) -> list[str]:
    model, found = config.model, []
    if model.position_embedding_type == "relative" and (model.model_family != "gpt" or model.segment_memory is None):
        found.append(
            "position_embedding_type=relative needs model_family=t5, or in a decoder segment_memory; give "
            "--model-family t5 or --segment-memory M, or drop it"
        )
    given = [name for name in DECODER_ONLY if getattr(model, name) is not None]
    return found + [f"{name}={getattr(model, name)} needs model_family=t5; drop it" for name in given]


def _t5_variant(config: RunConfig) -> list[str]:
    model = config.model
    missing = {name: value for name, value in T5_HAS.items() if getattr(model, name) != value}
    found = []
    if missing:
        has = ", ".join(f"{name}={_shown(value)}" for name, value in missing.items())
        flags = " ".join(_flag(name, value) for name, value in missing.items())
        found.append(f"model_family=t5 needs {has}; give {flags}")
    for name in T5_LACKS:
        value, default = getattr(model, name), type(model).model_fields[name].default
        if value != default:
            found.append(f"model_family=t5 has no {name}={_shown(value)}; drop --{name.replace('_', '-')}")
    if model.num_kv_heads != model.num_attention_heads:
        found.append(f"model_family=t5 has no num_query_groups={model.num_query_groups}; drop --num-query-groups")
    if model.relative_attention_max_distance <= model.relative_attention_num_buckets // 2:
        found.append(
            f"relative_attention_max_distance={model.relative_attention_max_distance} must be more than half of "
            f"relative_attention_num_buckets={model.relative_attention_num_buckets}: those are for single distances"
        )
    return found


def _t5_run(config: RunConfig) -> list[str]:
    data, found = config.data, []
    for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss"):
        if getattr(data, name):
            found.append(f"{name}=true is for decoders, not for model_family=t5; drop --{name.replace('_', '-')}")
    return found + _lengths(config)


def _lengths(config: RunConfig) -> list[str]:
    """Encoder and decoder have room for a text with at least one span."""
    kinds = denoisings(config)
    decoder, encoder = decoder_seq_length(config), config.batch.seq_length
    if any(name not in OBJECTIVES_OF["t5"] for name in config.training.objectives if name in FAMILY_OF):
        return []
    if decoder is None:
        return ["decoder_seq_length is missing; give --decoder-seq-length N"]
    texts = {name: kind.text_tokens(encoder, decoder) for name, kind in kinds.items()}
    if any(tokens < 2 for tokens in texts.values()):
        return [
            f"seq_length={encoder} and decoder_seq_length={decoder} leave span corruption no text: it needs at least "
            "a token that stays, one that is restored, and in both a sentinel and an end of text; use 3 or more for "
            "each"
        ]
    knobs = {
        "span": ("mean_noise_span_length={:g}", "lower --mean-noise-span-length, or raise --noise-density or"),
        "ul2": ("the mean span {:g} of ul2_denoisers", "give others in --ul2-denoisers, or raise"),
    }
    return [
        f"{knobs[name][0].format(noise.mean_length)} is longer than the {noise.counts(texts[name])[0]} noise tokens of "
        f"a text of {texts[name]}; {knobs[name][1]} --seq-length"
        for name, kind in kinds.items()
        if (noise := kind.too_long(texts[name])) is not None
    ][:1]


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _flag(name: str, value: object) -> str:
    flag = f"--{name.replace('_', '-')}"
    return flag if value is True else f"{flag} {value}"
