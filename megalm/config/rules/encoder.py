"""What only encoders have, what they lack, and which objective teaches them."""

from megalm.config.merging.settings import SETTINGS
from megalm.config.model import ModelConfig
from megalm.config.sections import RunConfig

ONLY_ENCODERS = ("num_tokentypes", "embedding_norm", "embedding_size", "bert_no_binary_head")
NO_ENCODER = ("use_parallel_residual", "scale_embeddings", "attn_logit_softcapping", "final_logit_softcapping")
ONLY_MASKED = ("mask_prob", "short_seq_prob", "whole_word_masking")


def encoder(config: RunConfig) -> list[str]:
    """Settings, objective and output fit the family of the model."""
    model, objective = config.model, config.training.objective
    found = _encoder(config) if model.is_encoder else []
    if model.model_family == "gpt":
        found += [_says_nothing(config, name, "model_family=bert") for name in ONLY_ENCODERS if _is_given(config, name)]
        if model.norm_order == "post":
            found.append("norm_order=post needs model_family=bert; use pre, sandwich or branch")
        if objective == "masked":
            found.append(
                "objective=masked hides tokens that model_family=gpt, which sees none after them, is not made to fill "
                "in; use --model-family bert, or --objective causal"
            )
    if objective == "causal":
        found += [_says_nothing(config, name, "objective=masked") for name in ONLY_MASKED if _is_given(config, name)]
    if objective == "masked":
        found += _masked(config)
    return found


def _encoder(config: RunConfig) -> list[str]:
    model = config.model
    found = [f"{name}={_value(config, name)} is not there in model_family=bert; drop it" for name in NO_ENCODER
             if _is_given(config, name)]  # fmt: skip
    if model.norm_order not in ("pre", "post"):
        found.append(f"norm_order={model.norm_order} is not there in model_family=bert; use post or pre")
    if config.training.objective == "causal":
        found.append(
            "objective=causal teaches model_family=bert nothing: it sees the token after each; use --objective masked"
        )
    if config.training.sample_prompt is not None:
        found.append(
            "sample_prompt needs a model that continues texts, and model_family=bert fills in masked tokens; drop it"
        )
    if config.kernels.cross_entropy_fusion_impl == "linear":
        found.append(
            "cross_entropy_fusion_impl=linear does not know the bias of the logits that model_family=bert has; "
            "use --cross-entropy-fusion-impl logits"
        )
    return found + _sentences(model)


def _sentences(model: ModelConfig) -> list[str]:
    if not model.has_sentence_head or model.num_tokentypes >= 2:
        return []
    return [
        f"num_tokentypes={model.num_tokentypes} does not tell the two texts apart that the sentence head is about; use "
        "2, or --bert-no-binary-head"
    ]


def _masked(config: RunConfig) -> list[str]:
    data, length = config.data, config.batch.seq_length
    found, is_pair = [], config.model.has_sentence_head
    least = 5 if is_pair else 3
    if length < least:
        found.append(
            f"seq_length={length} leaves nothing to hide beside the {least - 1 - is_pair} tokens around texts; use "
            f"--seq-length {least} or more"
        )
    if data.eod_mask_loss:
        found.append("eod_mask_loss=true asks for what is so with objective=masked, which never hides them; drop it")
    for name in ("reset_attention_mask", "reset_position_ids"):
        if is_pair and getattr(data, name):
            found.append(
                f"{name}=true takes documents apart, and a pair of texts for the sentence head is one; drop it, or "
                "give --bert-no-binary-head"
            )
    if not is_pair and _is_given(config, "short_seq_prob"):
        found.append(_says_nothing(config, "short_seq_prob", "pairs of texts, which --bert-no-binary-head leaves out"))
    return found


def _says_nothing(config: RunConfig, name: str, needs: str) -> str:
    return f"{name}={_value(config, name)} is for {needs}; drop one of them"


def _value(config: RunConfig, name: str) -> object:
    value = getattr(getattr(config, SETTINGS[name].section), name)
    return str(value).lower() if isinstance(value, bool) else value


def _is_given(config: RunConfig, name: str) -> bool:
    section = getattr(config, SETTINGS[name].section)
    return bool(getattr(section, name) != type(section).model_fields[name].default)
