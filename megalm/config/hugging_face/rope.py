"""Rotary positions in a config.json: `rope_parameters` of transformers 5, or the keys of earlier versions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megalm.config.hugging_face.pieces import Fields
from megalm.config.hugging_face.source import Source
from megalm.config.model import ModelConfig

_KNOWN = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "beta_fast", "beta_slow", "attention_factor", "original_max_position_embeddings"},
}
"""Kind of scaling -> the parameters that it has beside those of every kind."""


@dataclass(frozen=True)
class Rope:
    """One set of rotary frequencies for all layers."""

    base_key: str = "rope_theta"
    partial_key: str = "partial_rotary_factor"
    partial: bool = False
    """Whether the class knows heads of which a share turns."""

    def read(self, source: Source) -> Fields:
        """All rotary fields."""
        return {"position_embedding_type": "rope", **_fields(self._parameters(source), source)}

    def _parameters(self, source: Source) -> dict[str, Any]:
        given = source.values.get("rope_parameters")
        if isinstance(given, Mapping):
            return dict(given)
        old = {
            "rope_theta": source.values.get(self.base_key),
            "partial_rotary_factor": source.values.get(self.partial_key),
        }
        scaling = source.values.get("rope_scaling") or {}
        defaults = source.defaults.get("rope_parameters", {})
        return {**defaults, **{key: value for key, value in old.items() if value is not None}, **scaling}

    def write(self, config: ModelConfig) -> Fields:
        """rope_parameters, and the same by the keys of earlier versions."""
        parameters = _parameters(config)
        share = {"partial_rotary_factor": config.rotary_percent} if self.partial else {}
        keys: Fields = {"rope_parameters": parameters | share, self.base_key: config.rotary_base}
        if self.partial:
            keys[self.partial_key] = config.rotary_percent
        if parameters["rope_type"] != "default":
            keys["rope_scaling"] = {key: value for key, value in parameters.items() if key != "rope_theta"}
        return keys


@dataclass(frozen=True)
class RopeByLayer:
    """Frequencies of their own for layers with a window (Gemma 3, ModernBERT)."""

    base_key: str = "rope_theta"
    local_key: str = "rope_local_base_freq"
    base: float = 1e6
    """What the class takes where nothing is said."""

    def read(self, source: Source) -> Fields:
        """All rotary fields."""
        given = source.values.get("rope_parameters")
        if isinstance(given, Mapping) and "full_attention" in given:
            full = {"rope_theta": self.base, **given["full_attention"]}
            local = given.get("sliding_attention") or {}
        else:
            scaling = source.values.get("rope_scaling") or {}
            full = {"rope_theta": source.values.get(self.base_key, self.base), **scaling}
            local = {"rope_theta": source.values.get(self.local_key, 1e4)}
        if local.get("rope_type", "default") != "default":
            source.refuse(f"rope_type={local['rope_type']!r} of layers with a window is not supported")
        base = source.number("rope_theta", local.get("rope_theta", 1e4))
        return {"position_embedding_type": "rope", "rotary_base_local": base, **_fields(full, source)}

    def write(self, config: ModelConfig) -> Fields:
        """rope_parameters, and the same by the keys of earlier versions."""
        full = _parameters(config)
        local = {"rope_type": "default", "rope_theta": config.rotary_base_local or config.rotary_base}
        keys: Fields = {
            "rope_parameters": {"full_attention": full, "sliding_attention": local},
            self.base_key: config.rotary_base,
            self.local_key: local["rope_theta"],
        }
        if full["rope_type"] != "default":
            keys["rope_scaling"] = {key: value for key, value in full.items() if key != "rope_theta"}
        return keys


def _fields(parameters: dict[str, Any], source: Source) -> Fields:
    """megalm's fields of one set of parameters."""
    kind = parameters.pop("rope_type", parameters.pop("type", "default"))
    parameters.pop("type", None)
    fields: Fields = {"rotary_base": source.number("rope_theta", parameters.pop("rope_theta", 10000.0))}
    fields["rotary_percent"] = source.number("partial_rotary_factor", parameters.pop("partial_rotary_factor", 1.0))
    if kind not in _KNOWN:
        source.refuse(f"rope_type={kind!r} is not supported, only {', '.join(_KNOWN)}")
        return fields
    values = {key: source.number(key, value) for key, value in parameters.items() if value is not None}
    values.pop("truncate", None) if values.get("truncate") is True else None
    unknown = sorted(set(values) - _KNOWN[kind] - {"original_max_position_embeddings"})
    if unknown:
        source.refuse(f"rope parameters {', '.join(unknown)} of rope_type={kind!r} are not supported")
    missing = sorted({"factor"} & _KNOWN[kind] - set(values))
    if missing:
        source.refuse(f"rope_type={kind!r} lacks {', '.join(missing)}")
        return fields
    if kind == "linear":
        return {**fields, "rotary_seq_len_interpolation_factor": values["factor"]}
    if kind == "default":
        return fields
    fields["rope_scaling"], fields["rope_scaling_factor"] = kind, values["factor"]
    original = values.get("original_max_position_embeddings", source.get("max_position_embeddings"))
    fields["rope_scaling_original_max_position_embeddings"] = original
    prefix = {"llama3": "rope_", "yarn": "yarn_"}[kind]
    rest = _KNOWN[kind] - {"factor", "original_max_position_embeddings"}
    return {**fields, **{prefix + key: values[key] for key in rest if key in values}}


def _parameters(config: ModelConfig) -> dict[str, Any]:
    """transformers' parameters of the model's frequencies."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rotary_base}
    if config.rotary_seq_len_interpolation_factor != 1.0:
        return {**parameters, "rope_type": "linear", "factor": config.rotary_seq_len_interpolation_factor}
    if config.rope_scaling == "none":
        return parameters
    prefix = {"llama3": "rope_", "yarn": "yarn_"}[config.rope_scaling]
    rest = _KNOWN[config.rope_scaling] - {"factor", "original_max_position_embeddings"}
    own = {key: getattr(config, prefix + key) for key in sorted(rest)}
    return {
        **parameters,
        "rope_type": config.rope_scaling,
        "factor": config.rope_scaling_factor,
        "original_max_position_embeddings": config.rope_scaling_original_max_position_embeddings,
        **{key: value for key, value in own.items() if value is not None},
    }
