"""Decoder-only Transformer: GPT-2 style and Llama style from the same blocks.

Shapes: B batch, T sequence, N = T + 1 room for cumulative document lengths, D model width, V padded vocabulary,
R rotary width.
"""

from collections.abc import Iterable
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.kernels.rotary import rotary_tables
from megalm.models.blocks.attention import Attention, KVCache, LayerCache, RotaryTables
from megalm.models.blocks.documents import Documents
from megalm.models.blocks.dropout import Dropout
from megalm.models.blocks.embedding import Embedding
from megalm.models.blocks.head import FullLogits, Head, OutputHead, TiedHead, TokenLoss
from megalm.models.blocks.loss import weighted_losses
from megalm.models.blocks.mlp import build_mlp
from megalm.models.blocks.norm import build_norm
from megalm.models.blocks.randomness import seeded
from megalm.models.contract import Batch, LanguageModel, LayerStep, Losses, Stream, run_in_order
from megalm.randomness import stable_seed


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): pre-normalization. Source: Xiong et al. 2020, arXiv:2002.04745."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = build_norm(config, config.hidden_size)
        self.attention = Attention(config)
        self.mlp_norm = build_norm(config, config.hidden_size)
        self.mlp = build_mlp(config)
        self.dropout = Dropout(config.hidden_dropout)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: RotaryTables | None = None,
        cache: LayerCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """The residual stream (B, T, D) after this layer."""
        branch_BTD = self.dropout(self.attention(self.attention_norm(x_BTD), rotary, cache, documents))
        normalized_BTD, x_BTD = self.mlp_norm(branch_BTD, x_BTD)
        y_BTD: Tensor = self.dropout(self.mlp(normalized_BTD), x_BTD)
        return y_BTD


class GPT(LanguageModel):
    """A decoder-only language model, or the part of one that a pipeline stage holds.

    A stage is built by naming the layers that it holds and whether it holds the embedding and the head. With tied
    weights the stage that holds the head holds the token embedding too (its own copy, under the same name).

    Its one loss, "lm", is the cross entropy of `labels` (B, T), all in [0, vocab_size), weighted by `loss_mask`: mask
    the losses, not the labels. `position_ids` (B or 1, T) default to 0, 1, ... With `cu_seqlens` (B, N; integers on the
    host: 0, the end of each document, then T to the end of the row) attention stays inside each document.
    Columns of logits past `config.vocab_size` get neither probability nor gradient.
    """

    loss_weights = MappingProxyType({"lm": 1.0})

    def __init__(
        self,
        config: ModelConfig,
        padded_vocab_size: int | None = None,
        *,
        layers: Iterable[int] | None = None,
        has_embedding: bool = True,
        has_head: bool = True,
    ) -> None:
        super().__init__()
        assert config.vocab_size is not None, "vocab_size is filled from the tokenizer before the model is built"
        rows = config.padded_vocab_size() if padded_vocab_size is None else padded_vocab_size
        assert rows >= config.vocab_size, f"padded_vocab_size={rows} is less than vocab_size={config.vocab_size}"
        self.config = config
        if has_embedding or (has_head and config.tied):
            self.embedding = Embedding(config, rows, with_positions=has_embedding)
        numbers = range(config.num_layers) if layers is None else layers
        self.layer_runner = run_in_order
        self.layers = nn.ModuleDict({str(number): TransformerLayer(config) for number in numbers})
        if has_head:
            self.final_norm = build_norm(config, config.hidden_size)
            self.head = TiedHead() if config.tied else OutputHead(config.hidden_size, rows)
            self.token_loss = TokenLoss(config.vocab_size)
            self.full_logits = FullLogits(config.vocab_size)

    def embed(self, batch: Batch) -> Stream:
        """The residual stream (B, T, D) before the first layer, of `tokens` (B, T)."""
        if (seed := self._seed(batch)) is not None:
            torch.manual_seed(stable_seed(seed, "embedding"))
        return (self.embedding(batch["tokens"], _position_ids(batch)),)

    def run_layers(self, stream: Stream, batch: Batch, cache: KVCache | None = None) -> Stream:
        """The residual stream (B, T, D) after the layers that this module holds."""
        (x_BTD,) = stream
        rotary, cu_seqlens_BN = self.rotary(_position_ids(batch)), batch.get("cu_seqlens")
        documents = None if cu_seqlens_BN is None else Documents.of_batch(cu_seqlens_BN, x_BTD.device)
        seed, steps = self._seed(batch), []
        for number, layer in self.layers.items():
            kept = None if cache is None else cache.layer(int(number))
            step: LayerStep = partial(_run_layer, layer, rotary, kept, documents)
            if seed is not None:
                # by the layer's number, so that it drops the same in a stage; inside the step, for its recomputation
                step = seeded(step, stable_seed(seed, "layer", number))
            steps.append(step)
        return self.layer_runner(steps, stream)

    def rotary(self, position_ids_BT: Tensor) -> RotaryTables | None:
        """Cosines and sines (B or 1, T, R/2) for the layers, or None without rotary positions."""
        config = self.config
        if config.position_embedding_type != "rope":
            return None
        factor = config.rotary_seq_len_interpolation_factor
        return rotary_tables(position_ids_BT, config.rotary_dim, config.rotary_base, factor)

    def losses(self, stream: Stream, batch: Batch) -> Losses:
        """The weighted losses of all tokens (B, T), float32, nats."""
        losses_BT = self.token_loss(self.final_norm(stream[0]), batch["labels"], self._head())
        return {"lm": weighted_losses(losses_BT, batch["loss_mask"])}

    def counts(self, batch: Batch) -> Losses:
        """The weight of each token (B, T)."""
        return {"lm": batch["loss_mask"]}

    def logits(self, stream: Stream) -> Tensor:
        """Logits (B, T, V) from the last layer's output; padded vocabulary columns are -inf."""
        logits_BTV: Tensor = self.full_logits(self._head()(self.final_norm(stream[0])))
        return logits_BTV

    def stream_shapes(self, rows: int, length: int) -> tuple[tuple[int, ...], ...]:
        """That of the residual stream."""
        return ((rows, length, self.config.hidden_size),)

    def _head(self) -> Head:
        return partial(self.head, embedding=self.embedding.tokens) if self.config.tied else self.head

    def _seed(self, batch: Batch) -> int | None:
        """The seed of the batch, where something is drawn from it."""
        draws = self.training and (self.config.attention_dropout > 0 or self.config.hidden_dropout > 0)
        return batch.seed if draws else None


def _run_layer(
    layer: nn.Module, rotary: RotaryTables | None, cache: LayerCache | None, documents: Documents | None, stream: Stream
) -> Stream:
    return (layer(stream[0], rotary=rotary, cache=cache, documents=documents),)


def _position_ids(batch: Batch) -> Tensor:
    """The positions of the tokens, (B or 1, T)."""
    position_ids_BT, tokens_BT = batch.get("position_ids"), batch["tokens"]
    if position_ids_BT is not None:
        return position_ids_BT
    return torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
