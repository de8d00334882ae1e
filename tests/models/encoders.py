"""Small models of transformers' encoders: for each class a hypothesis strategy of its configurations."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from hypothesis import strategies as st

VOCAB = 99
LENGTH = 48
"""Positions of each."""


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes, with odd ones."""
    heads, head_dim = draw(st.sampled_from([(2, 6), (3, 10), (1, 8)]))
    return {
        "vocab_size": VOCAB,
        "num_hidden_layers": draw(st.sampled_from([2, 3])),
        "num_attention_heads": heads,
        "hidden_size": heads * head_dim,
        "intermediate_size": draw(st.sampled_from([40, 17])),
    }


@st.composite
def bert(draw: st.DrawFn) -> Any:
    return transformers.BertConfig(
        **draw(sizes()),
        max_position_embeddings=LENGTH,
        type_vocab_size=draw(st.sampled_from([2, 3])),
        hidden_act=draw(st.sampled_from(["gelu", "gelu_new", "relu"])),
        layer_norm_eps=draw(st.sampled_from([1e-12, 1e-4])),
    )


@st.composite
def roberta(draw: st.DrawFn) -> Any:
    padding = draw(st.sampled_from([1, 2]))
    return transformers.RobertaConfig(
        **draw(sizes()),
        max_position_embeddings=LENGTH + padding + 1,
        pad_token_id=padding,
        type_vocab_size=draw(st.sampled_from([1, 2])),
        layer_norm_eps=1e-5,
    )


@st.composite
def electra(draw: st.DrawFn) -> Any:
    v = draw(sizes())
    narrow = draw(st.sampled_from([16, v["hidden_size"]]))
    tied = draw(st.booleans())
    return transformers.ElectraConfig(
        **v, max_position_embeddings=LENGTH, embedding_size=narrow, tie_word_embeddings=tied
    )


@st.composite
def discriminator(draw: st.DrawFn) -> Any:
    v = draw(sizes())
    narrow, act = draw(st.sampled_from([16, v["hidden_size"]])), draw(st.sampled_from(["gelu", "gelu_new", "relu"]))
    return transformers.ElectraConfig(**v, max_position_embeddings=LENGTH, embedding_size=narrow, hidden_act=act)


@st.composite
def modernbert(draw: st.DrawFn) -> Any:
    kinds, rope = ("sliding_attention", "full_attention"), {"rope_type": "default"}
    v, bias = draw(sizes()), draw(st.booleans())
    layers = draw(st.sampled_from([None, list(kinds), ["sliding_attention"] * 2, ["full_attention"] * 2]))
    if layers is not None:
        v["num_hidden_layers"] = 2
    return transformers.ModernBertConfig(
        **v,
        max_position_embeddings=LENGTH,
        layer_types=layers,
        local_attention=draw(st.sampled_from([6, 2])),
        rope_parameters={kinds[0]: rope | {"rope_theta": 50.0}, kinds[1]: rope | {"rope_theta": 500.0}},
        norm_bias=draw(st.booleans()),
        **dict.fromkeys(("attention_bias", "mlp_bias", "classifier_bias"), bias),
        tie_word_embeddings=draw(st.booleans()),
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
    )


CLASSES: dict[str, Callable[[], st.SearchStrategy[Any]]] = {
    "BertForMaskedLM": bert,
    "BertForPreTraining": bert,
    "RobertaForMaskedLM": roberta,
    "ElectraForMaskedLM": electra,
    "ElectraForPreTraining": discriminator,
    "ModernBertForMaskedLM": modernbert,
}


def random_model(name: str, config: Any, seed: int = 0) -> Any:
    """A model whose weights are all random, biases and norms too, large enough that every term counts."""
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = getattr(transformers, name)(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.2)
    return model.eval()
