"""From a config.json to a model's settings and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megalm.config.generator import generator_heads
from megalm.config.hugging_face.architectures import ARCHITECTURES, Architecture
from megalm.config.hugging_face.source import Source
from megalm.config.hugging_face.stored import differ
from megalm.config.model import ModelConfig
from megalm.errors import ConfigError


def read_settings(values: Mapping[str, Any], where: str) -> tuple[str, ModelConfig]:
    """The class of transformers that a config.json names, and the settings of megalm's model that is the same.

    `where` names the file in errors.

    Raises:
        ConfigError: another class, or settings that megalm's models do not have; all of them listed.
    """
    name = _class_of(values, where)
    architecture = ARCHITECTURES[name]
    source = Source(values, architecture.defaults)
    fields = _read_fields(architecture, source)
    if not source.problems:
        try:
            config = ModelConfig(**fields)
        except ValidationError as error:
            source.problems += [f"{e['loc'][0]}={e['input']!r}: {e['msg']}" for e in error.errors()]
        else:
            source.problems += config.problems()
    if source.problems:
        raise ConfigError([f"{where} ({name}): {problem}" for problem in source.problems])
    return name, config


def read_folder(values: Mapping[str, Any], folder: Path) -> tuple[str, ModelConfig]:
    """The same of a model folder with this config.json: of some classes the weights say whether the head is tied.

    Raises:
        ConfigError: as `read_settings`.
    """
    name, config = read_settings(values, str(folder / "config.json"))
    pair = ARCHITECTURES[name].head_and_embedding
    if pair is not None and config.tied and differ(folder, *pair):
        config = config.model_copy(update={"untie_embeddings_and_output_weights": True})
    return name, config


def write_settings(name: str, config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model as class `name` of transformers has it."""
    architecture = ARCHITECTURES[name]
    values: dict[str, Any] = {"architectures": [name], "model_type": architecture.model_type}
    resolved = config.model_dump() | {
        "num_query_groups": config.num_kv_heads,
        "kv_channels": config.head_dim,
        "ffn_hidden_size": config.ffn_size,
        "query_pre_attn_scalar": config.query_pre_attn_scalar or config.head_dim,
        "embedding_size": config.embedding_width,
        "decoder_num_layers": config.decoder_layers,
    }
    values |= {key: resolved[field] for field, key in architecture.sizes.items()}
    for piece in architecture.pieces:
        values |= piece.write(config)
    return values


def architecture_of(config: ModelConfig) -> str:
    """The class of transformers that can hold the model.

    Raises:
        ConfigError: none can; for the class that comes nearest, what stands against it.
    """
    differences = {name: _lost(name, config) for name in ARCHITECTURES}
    best = min(differences, key=lambda name: len(differences[name]))
    if differences[best]:
        raise ConfigError(
            f"no class of transformers has this model; {best} comes nearest, without {', '.join(differences[best])}"
        )
    return best


def same_model(one: ModelConfig, other: ModelConfig) -> list[str]:
    """The settings in which two configurations mean different models."""
    first, second = _meaning(one), _meaning(other)
    return [f"{key}={first[key]}" for key in first if first[key] != second[key]]


def _class_of(values: Mapping[str, Any], where: str) -> str:
    names = [name for name in values.get("architectures") or () if isinstance(name, str)]
    by_type = [name for name, known in ARCHITECTURES.items() if known.model_type == values.get("model_type")]
    found = [name for name in names if name in ARCHITECTURES] or ([] if names else by_type)
    if not found:
        said = names or values.get("model_type")
        raise ConfigError(
            f"{where} is of class {said}, which megalm has no family for; it has {', '.join(ARCHITECTURES)}"
        )
    return found[0]


def _read_fields(architecture: Architecture, source: Source) -> dict[str, Any]:
    fields: dict[str, Any] = dict(architecture.fixed)
    for name, key in architecture.sizes.items():
        fields[name] = source.number(key, source.get(key))
    for piece in architecture.pieces:
        fields |= piece.read(source)
    if source.values.get("quantization_config"):
        source.refuse("quantization_config: quantized weights are not supported")
    return {name: value for name, value in fields.items() if value is not None}


def _lost(name: str, config: ModelConfig) -> list[str]:
    """What of the model class `name` would not hold."""
    try:
        _, again = read_settings(write_settings(name, config), "config.json")
    except ConfigError as error:
        return [str(error)] * 1000
    return same_model(config, again)


def _meaning(config: ModelConfig) -> dict[str, Any]:
    """What a configuration says of a model in use, whatever it was spelled by; not how to train or to start it."""
    values = config.model_dump(
        exclude={
            *("make_vocab_size_divisible_by", "init_method_std", "attention_dropout", "hidden_dropout"),
            *("num_query_groups", "kv_channels", "ffn_hidden_size", "query_pre_attn_scalar", "embedding_size"),
            *("window_size", "window_attn_skip_freq"),
            *("swiglu", "geglu", "relu", "squared_relu", "openai_gelu"),
            *("disable_bias_linear", "add_qkv_bias", "add_attention_output_bias"),
            *("decoder_num_layers", "decoder_seq_length", "scale_decoder_outputs"),
            *("rtd_generator_size", "rtd_loss_weight", "mtp_loss_scaling_factor"),
        }
    )
    if config.position_embedding_type == "relative":
        values["max_position_embeddings"] = None
    else:
        values |= {key: None for key in values if key.startswith("relative_")}
    if config.position_embedding_type != "rope":
        values |= {key: None for key in values if key.startswith(("rotary", "rope", "yarn"))}
    elif config.rope_scaling == "none":
        values |= {key: None for key in values if key.startswith(("rope_", "yarn_"))}
    elif config.rope_scaling == "llama3":
        values |= {key: None for key in values if key.startswith("yarn_")}
    else:
        values |= dict.fromkeys(("rope_low_freq_factor", "rope_high_freq_factor"))
    windows = tuple(config.window_of(layer) for layer in range(config.num_layers))
    if not any(windows):
        values["rotary_base_local"] = None
    return values | {
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "ffn_size": config.ffn_size,
        "embedding_width": config.embedding_width,
        "softmax_scale": config.softmax_scale,
        "windows": windows,
        "decoder_layers": config.decoder_layers,
        "generator_heads": generator_heads(config) if config.generator_layers else 0,
        "scales_decoder_outputs": config.encoder_decoder and config.scales_decoder_outputs,
        "gated": config.gated,
        "activation": config.activation,
        "biases": (config.qkv_bias, config.attention_output_bias, config.linear_bias),
    }
