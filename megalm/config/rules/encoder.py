"""What only encoders have, what they lack, and what masked language modelling needs."""

from megalm.config.model import ModelConfig
from megalm.config.rules.objective import is_given, says_nothing, shown
from megalm.config.sections import RunConfig
from megalm.config.spans import MaskedRuns

ONLY_ENCODERS = ("num_tokentypes", "embedding_norm", "embedding_size", "bert_no_binary_head")
NO_ENCODER = ("use_parallel_residual", "scale_embeddings", "attn_logit_softcapping", "final_logit_softcapping")


def encoder(config: RunConfig) -> list[str]:
    """Settings and output fit the family of the model."""
    model = config.model
    found = _encoder(config) if model.is_encoder else []
    if model.model_family == "gpt":
        found += [says_nothing(config, name, "model_family=bert") for name in ONLY_ENCODERS if is_given(config, name)]
        if model.norm_order == "post":
            found.append("norm_order=post needs model_family=bert; use pre, sandwich or branch")
    if "masked" in config.training.objectives:
        found += _masked(config)
    return found


def _encoder(config: RunConfig) -> list[str]:
    model = config.model
    found = [f"{name}={shown(config, name)} is not there in model_family=bert; drop it" for name in NO_ENCODER
             if is_given(config, name)]  # fmt: skip
    if model.norm_order not in ("pre", "post"):
        found.append(f"norm_order={model.norm_order} is not there in model_family=bert; use post or pre")
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
    if not is_pair and is_given(config, "short_seq_prob"):
        found.append(says_nothing(config, "short_seq_prob", "pairs of texts, which --bert-no-binary-head leaves out"))
    if not is_pair and is_given(config, "bert_sentence_head"):
        found.append(says_nothing(config, "bert_sentence_head", "a head that --bert-no-binary-head leaves out"))
    return found + _runs(config, length - (least - 1 - is_pair))


def _runs(config: RunConfig, room: int) -> list[str]:
    """Runs of hidden tokens fit into the text and between tokens that stay."""
    data, runs, found = config.data, MaskedRuns.of(config.data), []
    if data.masking_use_longer_ngrams and (runs.longest == 1 or data.masking_use_geometric_distribution):
        found.append(
            says_nothing(config, "masking_use_longer_ngrams", "masking_max_ngram > 1 without geometric lengths")
        )
    if room >= 1 and runs.longest > room:
        found.append(
            f"masking_max_ngram={runs.longest} is longer than the {room} tokens of a text; lower it, or raise "
            "--seq-length"
        )
    if runs.longest > 1 and data.mask_prob * (1 + 1 / runs.mean) > 1:
        most = int(100 / (1 + 1 / runs.mean)) / 100
        found.append(
            f"mask_prob={data.mask_prob} leaves no token between runs of {runs.mean:.2f} hidden ones on average; use "
            f"--mask-prob {most} or less"
        )
    return found
