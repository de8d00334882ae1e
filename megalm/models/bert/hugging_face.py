"""The tensors of transformers' encoders and those of `Bert`, by class: one table each, used in both directions."""

from collections.abc import Mapping
from dataclasses import dataclass

from megalm.config.model import ModelConfig
from megalm.models.foreign import ForeignTensor

Modules = Mapping[str, tuple[str, ...]]
"""Module of transformers -> modules of ours that make it up, for weights and biases alike."""


@dataclass(frozen=True, kw_only=True)
class EncoderNames:
    """How a class of transformers calls its tensors."""

    prefix: str
    """What all names but the head's begin with; files of the model without its head lack it."""
    layer: str
    outside: Modules
    """Embeddings and last norm."""
    inside: Modules
    """Modules of a layer."""
    heads: Modules
    """Modules beside the model, without its prefix."""
    head: str = ""
    """The module of the output head, where the class has one ..."""
    bias: str = ""
    """... and the tensor that is added to the logits."""
    ignored: tuple[str, ...] = ()
    """Patterns of tensors that are no parameters, or copies of others."""

    def tensors(self, config: ModelConfig) -> list[ForeignTensor]:
        """Every tensor that a model of the class may have."""
        outside = {f"{self.prefix}.{name}": own for name, own in self.outside.items()}
        found = [tensor for name, own in {**outside, **self.heads}.items() for tensor in _weight_and_bias(name, own)]
        for name, own in self.inside.items():
            inner = tuple(f"layers.{{n}}.{module}" for module in own)
            for tensor in _weight_and_bias(f"{self.prefix}.{self.layer}.{{n}}.{name}", inner):
                found += [tensor.of_layer(number) for number in range(config.num_layers)]
        if not self.head:
            return found
        head = ForeignTensor(f"{self.head}.weight", ("head.weight",))
        return [*found, head, ForeignTensor(self.bias, ("head_bias.bias",))]


def _weight_and_bias(name: str, own: tuple[str, ...]) -> list[ForeignTensor]:
    kinds = ("weight", "bias")
    return [ForeignTensor(f"{name}.{kind}", tuple(f"{module}.{kind}" for module in own)) for kind in kinds]


BERT_OUTSIDE = {
    "embeddings.word_embeddings": ("embedding.tokens",),
    "embeddings.position_embeddings": ("embedding.positions",),
    "embeddings.token_type_embeddings": ("embedding.token_types",),
    "embeddings.LayerNorm": ("embedding.norm",),
}
BERT_LAYER = {
    "attention.self.query": ("attention.wq",),
    "attention.self.key": ("attention.wk",),
    "attention.self.value": ("attention.wv",),
    "attention.output.dense": ("attention.wo",),
    "attention.output.LayerNorm": ("attention_output_norm",),
    "intermediate.dense": ("mlp.w_up",),
    "output.dense": ("mlp.w_down",),
    "output.LayerNorm": ("mlp_output_norm",),
}
_BERT_HEADS = {
    "cls.predictions.transform.dense": ("lm_head.dense",),
    "cls.predictions.transform.LayerNorm": ("lm_head.norm",),
}
POSITIONS = r".*embeddings\.position_ids"
_SENTENCES = (r"bert\.pooler\..*", r"cls\.seq_relationship\..*")


def _bert(heads: Modules, ignored: tuple[str, ...] = ()) -> EncoderNames:
    return EncoderNames(
        prefix="bert",
        layer="encoder.layer",
        outside=BERT_OUTSIDE,
        inside=BERT_LAYER,
        heads={**_BERT_HEADS, **heads},
        head="cls.predictions.decoder",
        bias="cls.predictions.bias",
        ignored=(POSITIONS, r"cls\.predictions\.decoder\.bias", *ignored),
    )


NAMES: Mapping[str, EncoderNames] = {
    "BertForMaskedLM": _bert({}, _SENTENCES),  # published files have the other head all the same
    "BertForPreTraining": _bert(
        {"bert.pooler.dense": ("sentence_head.pooler",), "cls.seq_relationship": ("sentence_head.classifier",)}
    ),
    "RobertaForMaskedLM": EncoderNames(
        prefix="roberta",
        layer="encoder.layer",
        outside=BERT_OUTSIDE,
        inside=BERT_LAYER,
        heads={"lm_head.dense": ("lm_head.dense",), "lm_head.layer_norm": ("lm_head.norm",)},
        head="lm_head.decoder",
        bias="lm_head.bias",
        ignored=(POSITIONS, r"lm_head\.decoder\.bias", r"roberta\.pooler\..*"),
    ),
    "ElectraForMaskedLM": EncoderNames(
        prefix="electra",
        layer="encoder.layer",
        outside={**BERT_OUTSIDE, "embeddings_project": ("embedding.projection",)},
        inside=BERT_LAYER,
        heads={
            "generator_predictions.dense": ("lm_head.dense",),
            "generator_predictions.LayerNorm": ("lm_head.norm",),
        },
        head="generator_lm_head",
        bias="generator_lm_head.bias",
        ignored=(POSITIONS,),
    ),
    "ModernBertForMaskedLM": EncoderNames(
        prefix="model",
        layer="layers",
        outside={
            "embeddings.tok_embeddings": ("embedding.tokens",),
            "embeddings.norm": ("embedding.norm",),
            "final_norm": ("final_norm",),
        },
        inside={
            "attn_norm": ("attention_norm",),
            "attn.Wqkv": ("attention.wq", "attention.wk", "attention.wv"),
            "attn.Wo": ("attention.wo",),
            "mlp_norm": ("mlp_norm",),
            "mlp.Wi": ("mlp.w_gate", "mlp.w_up"),
            "mlp.Wo": ("mlp.w_down",),
        },
        heads={"head.dense": ("lm_head.dense",), "head.norm": ("lm_head.norm",)},
        head="decoder",
        bias="decoder.bias",
    ),
}
"""Class of transformers -> its names."""
