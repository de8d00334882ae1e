"""The parts of a config.json that are more than a number under another name. Each is read and written here.

A piece reads megalm's fields from a `Source`, and writes transformers' keys from a model.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from megalm.config.hugging_face.source import Source
from megalm.config.model import ModelConfig

Fields = dict[str, Any]


class Piece(Protocol):
    """One of them."""

    def read(self, source: Source) -> Fields:
        """megalm's fields; what cannot be is noted in the source."""

    def write(self, config: ModelConfig) -> Fields:
        """The keys of config.json."""


@dataclass(frozen=True)
class Needs:
    """A key that must have this value, because megalm's models know no other."""

    key: str
    value: Any

    def read(self, source: Source) -> Fields:
        """Nothing."""
        found = source.get(self.key, self.value)
        if found != self.value and not (found is None and not self.value):
            source.refuse(f"{self.key}={found!r} is not supported, only {self.value!r}")
        return {}

    def write(self, config: ModelConfig) -> Fields:
        """The value."""
        return {self.key: self.value}


@dataclass(frozen=True)
class Switch:
    """A key that is true or false, and a field that is the same or the opposite."""

    key: str
    field: str
    opposite: bool = False

    def read(self, source: Source) -> Fields:
        """The field."""
        return {self.field: bool(source.get(self.key)) != self.opposite}

    def write(self, config: ModelConfig) -> Fields:
        """The key."""
        return {self.key: bool(getattr(config, self.field)) != self.opposite}


@dataclass(frozen=True)
class Dropouts:
    """Dropout of the residual stream under one or two keys, which must be equal."""

    keys: tuple[str, ...]

    def read(self, source: Source) -> Fields:
        """hidden_dropout."""
        values = {key: source.get(key) or 0.0 for key in self.keys}
        if len(set(values.values())) > 1:
            source.refuse(f"{' and '.join(f'{key}={value}' for key, value in values.items())} must be equal")
        return {"hidden_dropout": next(iter(values.values()))}

    def write(self, config: ModelConfig) -> Fields:
        """All keys."""
        return dict.fromkeys(self.keys, config.hidden_dropout)


class _NamedMlp(ABC):
    """A key whose value names the function of the MLP, and whether it has a gate."""

    key: str

    @property
    @abstractmethod
    def _names(self) -> Mapping[str, Fields]:
        """Each value -> the settings that it stands for."""

    def read(self, source: Source) -> Fields:
        """Which activation."""
        name = source.get(self.key)
        if name not in self._names:
            source.refuse(f"{self.key}={name!r} is not supported, only {', '.join(self._names)}")
            return {}
        return dict(self._names[name])

    def write(self, config: ModelConfig) -> Fields:
        """Its first name."""
        for name, fields in self._names.items():
            if _mlp(ModelConfig.model_construct(**fields)) == _mlp(config):
                return {self.key: name}
        return {self.key: config.activation}


def _mlp(config: ModelConfig) -> tuple[bool, str]:
    return config.gated, config.activation


@dataclass(frozen=True)
class Activations(_NamedMlp):
    """The function of the MLP, or of its gate."""

    key: str
    gated: bool

    @property
    def _names(self) -> Mapping[str, Fields]:
        tanh = {"geglu": True, "openai_gelu": True} if self.gated else {"openai_gelu": True}
        ways = ("gelu_pytorch_tanh", "gelu_new") if self.gated else ("gelu_new", "gelu_pytorch_tanh")
        names: dict[str, Fields] = {**dict.fromkeys(ways, tanh), "gelu": {"geglu": self.gated}}
        if self.gated:
            return {**names, "silu": {"swiglu": True}, "swish": {"swiglu": True}}
        return {**names, "relu": {"relu": True}, "relu2": {"squared_relu": True}}


@dataclass(frozen=True)
class FeedForward(_NamedMlp):
    """The MLP of T5 in one word: its activation, after "gated-" that of its gate; gated-gelu has the tanh form."""

    key: str = "feed_forward_proj"

    @property
    def _names(self) -> Mapping[str, Fields]:
        return {
            "relu": {"relu": True},
            "gelu": {},
            "gelu_new": {"openai_gelu": True},
            "gated-gelu": {"geglu": True, "openai_gelu": True},
            "gated-gelu_new": {"geglu": True, "openai_gelu": True},
            "gated-silu": {"swiglu": True},
        }


@dataclass(frozen=True)
class HeadOfDecoder:
    """Whether the head of a T5 has the embedding's weights, and whether what it reads is scaled.

    Up to transformers 4 one key says both; from 5 on the file tells which weights there are, and `scaled` the other.
    """

    scaled: str | None
    """The key of a class that may scale; the others never do."""

    def read(self, source: Source) -> Fields:
        """As the keys say it; the file has the last word on the weights (`read_folder`)."""
        tied = bool(source.get("tie_word_embeddings"))
        scales = self.scaled is not None and bool(source.get(self.scaled, tied))
        return {"untie_embeddings_and_output_weights": not tied, "scale_decoder_outputs": scales}

    def write(self, config: ModelConfig) -> Fields:
        """All keys."""
        keys = {"tie_word_embeddings": config.tied, self.scaled: config.scales_decoder_outputs}
        return {key: value for key, value in keys.items() if key is not None}


@dataclass(frozen=True)
class Biases:
    """Biases of attention's four projections under one key, and of the MLP's under another, or as the class has it."""

    attention: str | None
    mlp: str | None
    mlp_default: bool = False

    def read(self, source: Source) -> Fields:
        """Which linear layers have biases."""
        attention = bool(source.get(self.attention)) if self.attention else False
        mlp = bool(source.get(self.mlp)) if self.mlp else self.mlp_default
        if mlp and not attention:
            source.refuse(f"{self.attention}=False with biases in the MLP is not supported")
        return {
            "disable_bias_linear": not mlp,
            "add_qkv_bias": attention and not mlp,
            "add_attention_output_bias": attention and not mlp,
        }

    def write(self, config: ModelConfig) -> Fields:
        """The keys that the class has."""
        keys = {self.attention: config.attention_output_bias, self.mlp: config.linear_bias}
        return {key: value for key, value in keys.items() if key is not None}


@dataclass(frozen=True)
class Windows:
    """Sliding windows: of every layer, or of those that `layer_types` names.

    transformers counts a query's own position in a window of W keys; megalm counts those before it, W - 1.
    """

    by_layer: bool
    switch: str | None = None
    """A key without which there is no window (`use_sliding_window`)."""
    every: int | None = None
    """Without `layer_types`: every so manyth layer has none."""

    def read(self, source: Source) -> Fields:
        """window_size and window_attn_skip_freq."""
        width = source.number("sliding_window", source.get("sliding_window"))
        if width is None or (self.switch is not None and not source.get(self.switch)):
            return {}
        if not self.by_layer:
            return {"window_size": (width - 1, 0)}
        layers = source.get("num_hidden_layers")
        types = source.get("layer_types") or self._types(source, layers)
        windowed = [int(kind == "sliding_attention") for kind in types]
        if set(types) - {"sliding_attention", "full_attention"} or len(types) != layers:
            source.refuse(f"layer_types={types} must name sliding_attention or full_attention for each of {layers}")
            return {}
        if not any(windowed):
            return {}
        return {"window_size": (width - 1, 0), "window_attn_skip_freq": None if all(windowed) else pattern_of(windowed)}

    def _types(self, source: Source, layers: int) -> list[str]:
        every = source.get("sliding_window_pattern", source.get("_sliding_window_pattern", self.every))
        if every is not None:
            windowed = [(layer + 1) % every != 0 for layer in range(layers)]
        else:  # Qwen: the layers from a number on
            windowed = [layer >= source.get("max_window_layers", layers) for layer in range(layers)]
        return ["sliding_attention" if here else "full_attention" for here in windowed]

    def write(self, config: ModelConfig) -> Fields:
        """The keys that the class has."""
        windows = [config.window_of(layer) for layer in range(config.num_layers)]
        width = next((window[0] + 1 for window in windows if window is not None), None)
        if not self.by_layer:
            return {"sliding_window": width}
        types = ["full_attention" if window is None else "sliding_attention" for window in windows]
        keys = {"sliding_window": width, "layer_types": types}
        if self.switch is None:
            return keys
        first = next((layer for layer, window in enumerate(windows) if window is not None), config.num_layers)
        return {**keys, self.switch: width is not None, "max_window_layers": first}


def pattern_of(windowed: list[int]) -> tuple[int, ...]:
    """As window_attn_skip_freq: one number if every so manyth layer has no window, else one for each layer."""
    every = windowed.index(0) + 1
    regular = [int((layer + 1) % every != 0) for layer in range(len(windowed))]
    return (every,) if regular == windowed else tuple(windowed)
