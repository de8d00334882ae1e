"""The models of a training step's benchmark: ours, transformers' of the same shape, and one batch as both take it.

Dropout is zero on both sides, and transformers' models keep no keys and values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalm.config.model import ModelConfig

Fields = dict[str, Tensor]
MASKED = 0.15
"""Share of the tokens that an encoder fills in."""


def causal(tokens: Tensor) -> tuple[Fields, Fields]:
    """Every token is predicted, as a label at its own place: what is learnt does not matter."""
    ones = torch.ones(tokens.shape, device=tokens.device)
    return {"tokens": tokens, "labels": tokens, "loss_mask": ones}, {"input_ids": tokens, "labels": tokens}


def masked(tokens: Tensor) -> tuple[Fields, Fields]:
    """Some tokens are hidden and predicted; both sides make the logits of all."""
    generator = torch.Generator().manual_seed(1)
    hidden = (torch.rand(tokens.shape, generator=generator) < MASKED).to(tokens.device)
    shown = tokens.masked_fill(hidden, 3)
    theirs = {"input_ids": shown, "labels": tokens.masked_fill(~hidden, -100)}
    return {"tokens": shown, "labels": tokens, "loss_mask": hidden.float()}, theirs


def spans(tokens: Tensor) -> tuple[Fields, Fields]:
    """The decoder writes as many tokens as span corruption leaves it, of 512 114; no padding."""
    labels = tokens[:, : decoder_length(tokens.shape[1])].contiguous()
    written = torch.cat((torch.zeros_like(labels[:, :1]), labels[:, :-1]), dim=1)
    ours = {"tokens": tokens, "decoder_tokens": written, "labels": labels}
    return ours | {"loss_mask": torch.ones_like(labels, dtype=torch.float32)}, {"input_ids": tokens, "labels": labels}


def decoder_length(length: int) -> int:
    """Tokens of the decoder beside so many of the encoder."""
    return max(1, length * 114 // 512)


def _gpt2(transformers: Any, sizes: dict[str, Any]) -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=sizes["vocab_size"],
            n_embd=sizes["hidden_size"],
            n_layer=sizes["num_hidden_layers"],
            n_head=sizes["num_attention_heads"],
            n_positions=sizes["max_position_embeddings"],
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        )
    )


def _llama(transformers: Any, sizes: dict[str, Any]) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True))


def _bert(transformers: Any, sizes: dict[str, Any]) -> Any:
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **dropout))


def _t5(transformers: Any, sizes: dict[str, Any]) -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=sizes["vocab_size"],
            d_model=sizes["hidden_size"],
            d_ff=sizes["intermediate_size"],
            d_kv=sizes["hidden_size"] // sizes["num_attention_heads"],
            num_layers=sizes["num_hidden_layers"],
            num_heads=sizes["num_attention_heads"],
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )


@dataclass(frozen=True, kw_only=True)
class Style:
    """A kind of model, and what a batch of it is."""

    options: dict[str, Any]
    vocabulary: int
    """Padded as ours is, so that both sides make as many logits."""
    batch: Callable[[Tensor], tuple[Fields, Fields]]
    """Tokens (B, T) to the fields of ours and to the arguments of transformers'."""
    theirs: Callable[[Any, dict[str, Any]], Any]
    lacks: frozenset[str] = frozenset()
    """Groups of `OPERATORS` of which such a model has none."""

    def config(self, shape: dict[str, int], gated_width: int, length: int) -> ModelConfig:
        """Ours of these sizes."""
        given: dict[str, Any] = shape | self.options
        if self.options.get("swiglu"):
            given["ffn_hidden_size"] = gated_width
        if self.options.get("model_family") == "t5":
            given["decoder_seq_length"] = decoder_length(length)
        return ModelConfig(vocab_size=self.vocabulary, max_position_embeddings=length, **given)

    def transformers(self, config: ModelConfig) -> Any:
        """transformers' of the same shape."""
        import transformers

        sizes = {
            "vocab_size": self.vocabulary,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.ffn_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_attention_heads,
            "max_position_embeddings": config.max_position_embeddings,
        }
        model = self.theirs(transformers, sizes)
        model.config.use_cache = False
        return model


_of_gpt = partial(Style, vocabulary=50304, batch=causal)
STYLES = {
    "llama": _of_gpt(
        options={
            "position_embedding_type": "rope",
            "normalization": "RMSNorm",
            "swiglu": True,
            "disable_bias_linear": True,
        },
        theirs=_llama,
    ),
    "gpt2": _of_gpt(options={"openai_gelu": True}, theirs=_gpt2, lacks=frozenset({"rotary"})),
    "bert": Style(
        options={"model_family": "bert", "bert_no_binary_head": True},
        vocabulary=30592,
        batch=masked,
        theirs=_bert,
        lacks=frozenset({"rotary", "attention"}),
    ),
    "t5": Style(
        options={
            "model_family": "t5",
            "position_embedding_type": "relative",
            "normalization": "RMSNorm",
            "disable_bias_linear": True,
            "relu": True,
        },
        vocabulary=32128,
        batch=spans,
        theirs=_t5,
        lacks=frozenset({"rotary", "attention", "activation"}),
    ),
}
"""--style -> what it is of; the sizes of "124m" make them GPT-2, BERT Base and T5 Base."""
