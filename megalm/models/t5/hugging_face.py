"""The tensors of transformers' T5 and those of `T5`: one table, used in both directions."""

from collections.abc import Mapping
from dataclasses import dataclass

from megalm.config.model import ModelConfig
from megalm.models.foreign import ForeignTensor

_ATTENTION = {letter: f"w{letter}" for letter in "qkvo"}
_MLP = {"wi": "w_up", "wo": "w_down"}
_GATED_MLP = {"wi_0": "w_gate", "wi_1": "w_up", "wo": "w_down"}
OUTSIDE = {
    "shared": "embedding.tokens.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": "positions.encoder",
    "decoder.block.0.layer.0.SelfAttention.relative_attention_bias": "positions.decoder",
    "encoder.final_layer_norm": "encoder_norm.weight",
    "decoder.final_layer_norm": "final_norm.weight",
    "lm_head": "head.weight",
}
"""What no layer holds, or is shared by all of a stack: module of transformers -> our parameter."""


@dataclass(frozen=True)
class T5Names:
    """How transformers calls the tensors of an encoder-decoder; both its classes do it alike."""

    prefix: str = ""
    head: str = "lm_head"
    head_is_told_by_file: bool = True
    ignored: tuple[str, ...] = (
        r"(encoder|decoder)\.embed_tokens\.weight",  # copies of `shared`
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",  # never used
    )

    def tensors(self, config: ModelConfig) -> list[ForeignTensor]:
        """Every tensor that such a model may have."""
        found = [ForeignTensor(f"{name}.weight", (own,)) for name, own in OUTSIDE.items()]
        for number in range(config.num_layers):
            found += _layer(f"encoder.block.{number}", number, {"SelfAttention": "attention"}, config.gated)
        for number in range(config.decoder_layers):
            branches = {"SelfAttention": "attention", "EncDecAttention": "cross_attention"}
            found += _layer(f"decoder.block.{number}", config.num_layers + number, branches, config.gated)
        return found


def _layer(block: str, number: int, attentions: Mapping[str, str], gated: bool) -> list[ForeignTensor]:
    """One layer: its attentions, each with its norm, then the MLP."""
    names = {}
    for place, (theirs, ours) in enumerate(attentions.items()):
        names[f"{place}.layer_norm"] = f"{ours}_norm"
        names |= {f"{place}.{theirs}.{letter}": f"{ours}.{own}" for letter, own in _ATTENTION.items()}
    last = len(attentions)
    names[f"{last}.layer_norm"] = "mlp_norm"
    mlp = _GATED_MLP if gated else _MLP
    names |= {f"{last}.DenseReluDense.{theirs}": f"mlp.{ours}" for theirs, ours in mlp.items()}
    return [
        ForeignTensor(f"{block}.layer.{theirs}.weight", (f"layers.{number}.{ours}.weight",))
        for theirs, ours in names.items()
    ]


NAMES: Mapping[str, T5Names] = {"T5ForConditionalGeneration": T5Names(), "MT5ForConditionalGeneration": T5Names()}
"""Class of transformers -> its names."""
