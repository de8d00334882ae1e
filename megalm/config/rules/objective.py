"""Which objectives train which family of models, and which settings are whose."""

from collections.abc import Mapping

from megalm.config.merging.settings import SETTINGS
from megalm.config.sections import RunConfig
from megalm.config.spans import denoisings

OBJECTIVES_OF: Mapping[str, tuple[str, ...]] = {
    "gpt": ("causal", "prefix", "fim", "ul2"),
    "bert": ("masked",),
    "electra": ("rtd",),
    "t5": ("span", "ul2"),
}
"""Family -> what trains it, its own first."""
FAMILY_OF = {objective: family for family, names in OBJECTIVES_OF.items() for objective in names}
"""Objective -> a family that it trains; of several the last."""
_KIND = {
    "gpt": "decoders", "bert": "encoders", "electra": "a generator and a discriminator", "t5": "encoder-decoders"
}  # fmt: skip
_MASKING = (
    *("mask_prob", "whole_word_masking", "masking_max_ngram", "masking_use_longer_ngrams"),
    "masking_use_geometric_distribution",
)
SETTINGS_OF: Mapping[str, tuple[str, ...]] = {
    "fim": (
        *("fim_rate", "fim_spm_rate", "fim_unit", "fim_split_sample", "fim_fragment_rate", "fim_no_prefix"),
        *("fim_prefix_token", "fim_middle_token", "fim_suffix_token"),
    ),
    "masked": (*_MASKING, "short_seq_prob", "bert_sentence_head"),
    "rtd": _MASKING,
    "ul2": ("ul2_denoisers",),
    "span": ("noise_density", "mean_noise_span_length"),
}
"""Objective -> settings that say nothing to the others."""


def objectives(config: RunConfig) -> list[str]:
    """The objectives train the model's family, and every setting of an objective has one."""
    names, family = tuple(config.training.objectives), config.model.model_family
    foreign = [name for name in names if name in FAMILY_OF and name not in OBJECTIVES_OF.get(family, ())]
    found = []
    if foreign and family in OBJECTIVES_OF:
        other = FAMILY_OF[foreign[0]]
        which = "objective" if config.training.objective_mixture is None else "objective_mixture: objective"
        found.append(
            f"{which}={foreign[0]} trains {_KIND[other]}, not model_family={family}; use --model-family {other}, or "
            f"--objective {OBJECTIVES_OF[family][0]}"
        )
    if all(name in FAMILY_OF for name in names):  # another's may read them
        found += [
            says_nothing(config, setting, f"objective={' or '.join(users)}")
            for setting, users in _users().items()
            if not set(users) & set(names) and is_given(config, setting)
        ]
    found += _fim(config) if "fim" in names else []
    return found + (_ul2_of_decoders(config) if "ul2" in names and family == "gpt" else [])


def _users() -> dict[str, list[str]]:
    """Setting -> the objectives that it says something to."""
    found: dict[str, list[str]] = {}
    for objective, settings in SETTINGS_OF.items():
        for setting in settings:
            found.setdefault(setting, []).append(objective)
    return found


def ahead(config: RunConfig) -> list[str]:
    """What multi-token prediction needs, and what it is not there for."""
    model, depths = config.model, config.model.mtp_num_layers
    if not depths:
        given = is_given(config, "mtp_loss_scaling_factor")
        return [says_nothing(config, "mtp_loss_scaling_factor", "mtp_num_layers >= 1")] if given else []
    if model.model_family in OBJECTIVES_OF and model.model_family != "gpt":
        return [says_nothing(config, "mtp_num_layers", "model_family=gpt")]
    found, stages = [], config.parallel.pipeline_model_parallel_size
    if stages > 1:
        found.append(
            f"pipeline_model_parallel_size={stages} does not go with mtp_num_layers={depths}: its modules read the "
            "embeddings, which the last stage lacks; use --tensor-model-parallel-size, or more data-parallel ranks "
            "with --zero-stage"
        )
    if seeing := [name for name in ("prefix", "ul2") if name in config.training.objectives]:
        found.append(
            f"mtp_num_layers={depths} does not go with objective={seeing[0]}: where tokens see those after them, "
            "a module reads what it is to predict; drop one of them"
        )
    if depths >= config.batch.seq_length:
        found.append(
            f"mtp_num_layers={depths} leaves no target in seq_length={config.batch.seq_length}; use less than that"
        )
    return found


_FIM_TOKENS = 3


def _fim(config: RunConfig) -> list[str]:
    found, length = [], config.batch.seq_length
    if length <= _FIM_TOKENS:
        found.append(
            f"seq_length={length} leaves objective=fim no text beside the {_FIM_TOKENS} tokens around its parts; use "
            f"--seq-length {_FIM_TOKENS + 1} or more"
        )
    if config.data.fim_split_sample is None and is_given(config, "fim_fragment_rate"):
        found.append(says_nothing(config, "fim_fragment_rate", "fragments, which fim_split_sample parts"))
    return found


def _ul2_of_decoders(config: RunConfig) -> list[str]:
    """Rows of a text that is read and of what is written of it: no documents, and room for both."""
    data, length, names = config.data, config.batch.seq_length, tuple(config.training.objectives)
    found = [
        f"{name}=true is for rows of documents, which objective=ul2 has not; drop --{name.replace('_', '-')}"
        for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
        if getattr(data, name)
    ]
    if len(names) > 1:
        found.append(
            "objective_mixture: in a decoder ul2 takes texts of another length than the other objectives; use "
            "--objective ul2, of which S:0.25 and others in --ul2-denoisers continue texts as prefix does"
        )
    kind = denoisings(config)["ul2"]
    text = kind.row_tokens(length)
    if text < 2:
        found.append(
            f"seq_length={length} leaves objective=ul2 no text: a row has its mode, a token that stays, one that is "
            "restored, two sentinels and an end of text; use --seq-length 6 or more"
        )
    elif (noise := kind.too_long(text)) is not None:
        found.append(
            f"the mean span {noise.mean_length:g} of ul2_denoisers is longer than the {noise.counts(text)[0]} noise "
            f"tokens of a text of {text}; give others in --ul2-denoisers, or raise --seq-length"
        )
    return found


def says_nothing(config: RunConfig, name: str, needs: str) -> str:
    """The problem of a setting that is given without what it is for."""
    return f"{name}={shown(config, name)} is for {needs}; drop one of them"


def shown(config: RunConfig, name: str) -> object:
    """The value of a setting as a recipe has it."""
    value = getattr(getattr(config, SETTINGS[name].section), name)
    return str(value).lower() if isinstance(value, bool) else value


def is_given(config: RunConfig, name: str) -> bool:
    """Whether a setting is not what its section has by default."""
    section = getattr(config, SETTINGS[name].section)
    return bool(getattr(section, name) != type(section).model_fields[name].default)
