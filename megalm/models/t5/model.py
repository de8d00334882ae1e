"""Encoder-decoder Transformer: T5 1.0 and 1.1, flan-T5 and mT5 from the same blocks.

The layers are numbered through, the encoder's first. The stream has three tensors from the beginning to the end, so
that any cut makes pipeline stages: the encoder's residual stream, which its last layer makes the memory of the decoder;
the decoder's; and both tables of relative positions, which the first stage holds and all layers use.

Shapes: B batch, S encoder tokens, T decoder tokens, D model width, V padded vocabulary, N buckets, H heads.
"""

from collections.abc import Callable, Iterable
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.models.blocks.attention import KVCache
from megalm.models.blocks.dropout import Dropout
from megalm.models.blocks.embedding import TokenEmbedding, vocabulary_sizes
from megalm.models.blocks.head import FullLogits, Head, OutputHead, TiedHead, TokenLoss
from megalm.models.blocks.norm import build_norm
from megalm.models.blocks.randomness import seed_part, seeded_layer
from megalm.models.blocks.relative import RelativeBias, RelativePositions
from megalm.models.contract import Batch, LayerStep, Losses, Past, Stream, run_in_order
from megalm.models.t5.layers import DecoderLayer, EncoderLayer
from megalm.models.token_model import TokenModel


class TokenTable(nn.Module):
    """Token embeddings of both stacks, then dropout."""

    def __init__(self, config: ModelConfig, rows: int) -> None:
        super().__init__()
        self.tokens = TokenEmbedding(rows, config.hidden_size)
        self.dropout = Dropout(config.hidden_dropout)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Shape (B, S, D)."""
        x_BSD: Tensor = self.dropout(self.tokens(tokens_BS))
        return x_BSD


class T5(TokenModel):
    """An encoder-decoder, or the part of one that a pipeline stage holds.

    The encoder reads `tokens` (B, S), of which those with `padding_mask` (B, S; bool) False are padding that nobody
    attends to; without the field none is. The decoder reads `decoder_tokens` (B, T). The one loss, "lm", is the cross
    entropy of `labels` (B, T), all in [0, vocab_size), weighted by `loss_mask`.

    With tied weights the stage that holds the head holds the token embedding too (its own copy, under the same name).
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
        vocab_size, rows = vocabulary_sizes(config, padded_vocab_size)
        self.config = config
        numbers = list(range(config.total_layers) if layers is None else layers)
        if has_embedding or (has_head and config.tied):
            self.embedding = TokenTable(config, rows)
        if has_embedding:
            self.positions = RelativePositions(config)
        self.encoder_bias = RelativeBias(config, causal=False)
        self.decoder_bias = RelativeBias(config, causal=True)
        self.layer_runner = run_in_order
        kinds = {number: EncoderLayer if number < config.num_layers else DecoderLayer for number in numbers}
        self.layers = nn.ModuleDict({str(number): kind(config) for number, kind in kinds.items()})
        if config.num_layers - 1 in numbers:
            self.encoder_norm = build_norm(config, config.hidden_size)
            self.encoder_dropout = Dropout(config.hidden_dropout)
        if has_head:
            self.final_norm = build_norm(config, config.hidden_size)
            self.final_dropout = Dropout(config.hidden_dropout)
            self.head = TiedHead() if config.tied else OutputHead(config.hidden_size, rows)
            self.token_loss = TokenLoss(vocab_size)
            self.full_logits = FullLogits(vocab_size)

    def embed(self, batch: Batch) -> Stream:
        """The stream before the first layer: (B, S, D), (B, T, D), (2, N, H)."""
        seed_part(self._seed(batch), "embedding")
        return self.embedding(batch["tokens"]), self.embedding(batch["decoder_tokens"]), self.positions()

    def run_layers(self, stream: Stream, batch: Batch, cache: Past | None = None) -> Stream:
        """The stream after the layers that this module holds.

        With a `cache` the decoder continues what that has stored; once it has something, the encoder has been read, and
        `tokens` say no more.
        """
        assert cache is None or isinstance(cache, KVCache), "an encoder-decoder has no memory of segments"
        seed, steps = self._seed(batch), []
        before = 0 if cache is None else cache.length
        biases = self._biases(stream[2], batch, before)
        for name, layer in self.layers.items():
            number = int(name)
            if before and number < self.config.num_layers:
                continue
            step: LayerStep = partial(self._encoder_step, number, layer, biases[0])
            if isinstance(layer, DecoderLayer):
                kept = () if cache is None else (cache.layer(number), cache.source(number))
                step = partial(_decoder_step, layer, biases[1], _seen(batch), kept)
            steps.append(seeded_layer(step, seed, name))
        return self.layer_runner(steps, stream)

    def losses(self, stream: Stream, batch: Batch) -> Losses:
        """The weighted losses of all decoder tokens (B, T), float32, nats."""
        seed_part(self._seed(batch), "head")
        return self.token_losses(self.read_by_head(stream), batch)

    def counts(self, batch: Batch) -> Losses:
        """The weight of each decoder token (B, T)."""
        return self.token_counts(batch)

    def stream_shapes(self, rows: int, length: int, parts: int = 1) -> tuple[tuple[int, ...], ...]:
        """Those of both residual streams, and of the tables, which every rank has whole."""
        config = self.config
        assert config.decoder_seq_length is not None, "decoder_seq_length is filled in before the model is built"
        tables = (2, config.relative_attention_num_buckets, config.num_attention_heads)
        width = config.hidden_size
        return (rows, length // parts, width), (rows, config.decoder_seq_length // parts, width), tables

    def _biases(self, tables_2NH: Tensor, batch: Batch, before: int) -> tuple[Tensor | None, Tensor | None]:
        """What is added to the scores of the encoder's layers and of the decoder's, where this part has such layers.

        `before` so many tokens the decoder has read.
        """
        kinds = {type(layer) for layer in self.layers.values()}
        encoder = decoder = None
        if EncoderLayer in kinds and not before:
            encoder = self.encoder_bias(tables_2NH[0], batch["tokens"].shape[1])
            if (seen := _seen(batch)) is not None:
                encoder = encoder.masked_fill(~seen, float("-inf"))
        if DecoderLayer in kinds:
            decoder = self.decoder_bias(tables_2NH[1], batch["decoder_tokens"].shape[1], before)
        return encoder, decoder

    def _encoder_step(self, number: int, layer: nn.Module, bias: Tensor | None, stream: Stream) -> Stream:
        x_BSD, y_BTD, tables = stream
        x_BSD = layer(x_BSD, bias)
        if number == self.config.num_layers - 1:
            x_BSD = self.encoder_dropout(self.encoder_norm(x_BSD))
        return x_BSD, y_BTD, tables

    def read_by_head(self, stream: Stream) -> Tensor:
        """The normalized output of the decoder's last layer (B, T, D)."""
        x_BSD, y_BTD, tables = stream
        if not self.layers:  # a stage of the head alone: the stage before waits for the gradients of all that it sent
            y_BTD = _beside(y_BTD, x_BSD, tables)
        read_BTD: Tensor = self.final_dropout(self.final_norm(y_BTD))
        return read_BTD * self.config.hidden_size**-0.5 if self.config.scales_decoder_outputs else read_BTD

    def _head(self) -> Head:
        return partial(self.head, embedding=self.embedding.tokens) if self.config.tied else self.head


class _Beside(torch.autograd.Function):
    """Forward: the first tensor. Backward: its gradient, and zeros for the others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(*others)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads[0], *(torch.zeros_like(other) for other in ctx.saved_tensors)


_beside: Callable[..., Tensor] = _Beside.apply


def _decoder_step(
    layer: nn.Module, bias: Tensor | None, seen: Tensor | None, kept: tuple[object, ...], stream: Stream
) -> Stream:
    x_BSD, y_BTD, tables = stream
    return x_BSD, layer(y_BTD, x_BSD, bias, seen, *kept), tables


def _seen(batch: Batch) -> Tensor | None:
    """Which tokens of the encoder are no padding, (B, 1, 1, S)."""
    mask_BS = batch.get("padding_mask")
    return None if mask_BS is None else mask_BS[:, None, None]
