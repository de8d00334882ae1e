"""The parts of an encoder's config.json that are more than a number under another name."""

from dataclasses import dataclass

from megalm.config.hugging_face.pieces import Fields, pattern_of
from megalm.config.hugging_face.source import Source
from megalm.config.model import ModelConfig

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class PositionsAfterPadding:
    """Positions whose rows follow that of the padding token's id (RoBERTa); all of them count as positions."""

    def read(self, source: Source) -> Fields:
        """position_embedding_offset and max_position_embeddings."""
        padding = source.number("pad_token_id", source.get("pad_token_id"))
        rows = source.number("max_position_embeddings", source.get("max_position_embeddings"))
        if padding is None or rows is None or padding < 0:
            source.refuse(f"pad_token_id={padding} and max_position_embeddings={rows} say no positions")
            return {}
        return {"position_embedding_offset": padding + 1, "max_position_embeddings": rows - padding - 1}

    def write(self, config: ModelConfig) -> Fields:
        """pad_token_id and max_position_embeddings."""
        offset = config.position_embedding_offset
        return {"pad_token_id": offset - 1, "max_position_embeddings": (config.max_position_embeddings or 0) + offset}


@dataclass(frozen=True)
class LocalAttention:
    """Windows on both sides, of half the `local_attention` each, in layers that `layer_types` names (ModernBERT)."""

    def read(self, source: Source) -> Fields:
        """window_size and window_attn_skip_freq."""
        layers, width = source.get("num_hidden_layers"), source.number("width", source.get("local_attention"))
        every = source.get("global_attn_every_n_layers")
        types = source.get("layer_types") or [_LOCAL if layer % every else _GLOBAL for layer in range(layers)]
        if set(types) - {_LOCAL, _GLOBAL} or len(types) != layers:
            source.refuse(f"layer_types={types} must name {_LOCAL} or {_GLOBAL} for each of {layers}")
            return {}
        windowed = [int(kind == _LOCAL) for kind in types]
        if not any(windowed) or width is None:
            return {}
        pattern = None if all(windowed) else pattern_of(windowed)
        return {"window_size": (width // 2, width // 2), "window_attn_skip_freq": pattern}

    def write(self, config: ModelConfig) -> Fields:
        """local_attention and layer_types."""
        windows = [config.window_of(layer) for layer in range(config.num_layers)]
        before = next((window[0] for window in windows if window is not None), None)
        keys: Fields = {"layer_types": [_GLOBAL if window is None else _LOCAL for window in windows]}
        return keys if before is None else {**keys, "local_attention": 2 * before}


@dataclass(frozen=True)
class BiasesByPart:
    """Biases of attention, MLP and the head's transform, which must be alike, and of norms (ModernBERT)."""

    keys: tuple[str, ...] = ("attention_bias", "mlp_bias", "classifier_bias")
    norms: str = "norm_bias"

    def read(self, source: Source) -> Fields:
        """disable_bias_linear and disable_bias_norm."""
        values = {key: bool(source.get(key)) for key in self.keys}
        if len(set(values.values())) > 1:
            source.refuse(f"{' and '.join(f'{key}={value}' for key, value in values.items())} must be equal")
        return {
            "disable_bias_linear": not values[self.keys[0]],
            "disable_bias_norm": not source.get(self.norms),
        }

    def write(self, config: ModelConfig) -> Fields:
        """All keys."""
        return {**dict.fromkeys(self.keys, config.linear_bias), self.norms: not config.disable_bias_norm}


@dataclass(frozen=True)
class HeadActivation:
    """The activation of the head's transform, a key of its own that must be the MLP's (ModernBERT)."""

    key: str
    of_mlp: str

    def read(self, source: Source) -> Fields:
        """Nothing."""
        if source.get(self.key) != source.get(self.of_mlp):
            source.refuse(
                f"{self.key}={source.get(self.key)!r} is not supported beside {self.of_mlp}="
                f"{source.get(self.of_mlp)!r}; they must be equal"
            )
        return {}

    def write(self, config: ModelConfig) -> Fields:
        """The key."""
        names = {"gelu_tanh": "gelu_new"}
        return {self.key: names.get(config.activation, config.activation)}
