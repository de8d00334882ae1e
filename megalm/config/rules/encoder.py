"""What only encoders have, what they lack, and what masked language modelling needs."""

from megalm.config.generator import generator_problems
from megalm.config.model import ModelConfig
from megalm.config.rules.objective import OBJECTIVES_OF, is_given, says_nothing, shown
from megalm.config.sections import RunConfig
from megalm.config.spans import MaskedRuns

ONLY_ENCODERS = ("num_tokentypes", "embedding_norm", "embedding_size", "bert_no_binary_head")
ONLY_ELECTRA = ("rtd_generator_size", "rtd_loss_weight")
NO_ENCODER = ("use_parallel_residual", "scale_embeddings", "attn_logit_softcapping", "final_logit_softcapping")


def encoder(config: RunConfig) -> list[str]:
    """Settings and output fit the family of the model."""
    model = config.model
    found = _encoder(config) if model.is_encoder else []
    if model.model_family == "electra":
        found += _electra(config)
    elif model.model_family in OBJECTIVES_OF:
        found += [says_nothing(config, name, "model_family=electra") for name in ONLY_ELECTRA if is_given(config, name)]
    if model.model_family == "gpt":
        found += [says_nothing(config, name, "model_family=bert") for name in ONLY_ENCODERS if is_given(config, name)]
        if model.norm_order == "post":
            found.append("norm_order=post needs model_family=bert; use pre, sandwich or branch")
    return found + [
        problem for name in ("masked", "rtd") if name in config.training.objectives for problem in _masked(config, name)
    ]


def _encoder(config: RunConfig) -> list[str]:
    model = config.model
    family = f"model_family={model.model_family}"
    found = [f"{name}={shown(config, name)} is not there in {family}; drop it" for name in NO_ENCODER
             if is_given(config, name)]  # fmt: skip
    if model.norm_order not in ("pre", "post"):
        found.append(f"norm_order={model.norm_order} is not there in {family}; use post or pre")
    return found + _sentences(model)


def _electra(config: RunConfig) -> list[str]:
    model, stages = config.model, config.parallel.pipeline_model_parallel_size
    found = generator_problems(model)
    if config.training.sample_prompt is not None:
        found.append(
            "sample_prompt needs a model that continues texts or fills in masks, and model_family=electra tells "
            "replaced tokens; drop it"
        )
    if model.num_kv_heads != model.num_attention_heads:
        found.append(f"model_family=electra has no num_query_groups={model.num_query_groups}; drop --num-query-groups")
    if model.bert_no_binary_head:
        found.append(says_nothing(config, "bert_no_binary_head", "model_family=bert"))
    if stages > 1:
        found.append(
            f"pipeline_model_parallel_size={stages} does not go with model_family=electra: the generator's loss arises "
            "in the middle of the model, and stages hand on activations alone; use --tensor-model-parallel-size, or "
            "more data-parallel ranks with --zero-stage"
        )
    if not model.rtd_generator_size and "rtd" in config.training.objectives:
        found.append(
            "rtd_generator_size=0 leaves nobody who replaces tokens; use 0.25, or another share of the "
            f"num_attention_heads={model.num_attention_heads}"
        )
    return found


def _sentences(model: ModelConfig) -> list[str]:
    if not model.has_sentence_head or model.num_tokentypes >= 2:
        return []
    return [
        f"num_tokentypes={model.num_tokentypes} does not tell the two texts apart that the sentence head is about; use "
        "2, or --bert-no-binary-head"
    ]


def _masked(config: RunConfig, objective: str) -> list[str]:
    data, length = config.data, config.batch.seq_length
    found, is_pair = [], config.model.has_sentence_head
    least = 5 if is_pair else 3
    if length < least:
        found.append(
            f"seq_length={length} leaves nothing to hide beside the {least - 1 - is_pair} tokens around texts; use "
            f"--seq-length {least} or more"
        )
    if data.eod_mask_loss:
        found.append(
            f"eod_mask_loss=true asks for what is so with objective={objective}, which never hides them; drop it"
        )
    for name in ("reset_attention_mask", "reset_position_ids"):
        if is_pair and getattr(data, name):
            found.append(
                f"{name}=true takes documents apart, and a pair of texts for the sentence head is one; drop it, or "
                "give --bert-no-binary-head"
            )
    if objective == "rtd":  # that both are masked's is said already
        return found + _runs(config, length - (least - 1 - is_pair))
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
