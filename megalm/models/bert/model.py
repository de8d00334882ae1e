"""Encoder-only Transformer: BERT, RoBERTa, ELECTRA's generator and ModernBERT from the same blocks.

Shapes: B batch, T sequence, N = T + 1 room for cumulative document lengths, D model width, E embedding width,
V padded vocabulary, R rotary width.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.errors import ConfigError
from megalm.models.bert.parts import EncoderEmbedding, SentenceHead, TokenTransform
from megalm.models.blocks.attention import Attention
from megalm.models.blocks.bidirectional import BidirectionalAttention, Padding, Within
from megalm.models.blocks.documents import Documents
from megalm.models.blocks.dropout import Dropout
from megalm.models.blocks.embedding import position_ids, vocabulary_sizes
from megalm.models.blocks.head import FullLogits, Head, OutputBias, OutputHead, TiedHead, TokenLoss
from megalm.models.blocks.loss import weighted_losses
from megalm.models.blocks.mlp import build_mlp
from megalm.models.blocks.norm import build_norm
from megalm.models.blocks.randomness import seed_part, seeded_layer
from megalm.models.blocks.rotary import RotaryTables, Tables
from megalm.models.contract import Batch, LayerStep, Losses, Past, Stream, run_in_order
from megalm.models.token_model import TokenModel


class EncoderLayer(nn.Module):
    """Attention and MLP, each a branch f of the residual stream: norm(x + f(x)) ("post") or x + f(norm(x)) ("pre").

    Where embeddings are normalized, the first "pre" layer does not do it again.
    Source: Devlin et al. 2019, arXiv:1810.04805; "pre": Warner et al. 2024 (ModernBERT), arXiv:2412.13663.
    """

    def __init__(self, config: ModelConfig, number: int = 0) -> None:
        super().__init__()
        core = BidirectionalAttention(
            config.attention_dropout,
            scale=config.softmax_scale if config.query_pre_attn_scalar else None,
            window=config.window_of(number),
        )
        self.attention = Attention(config, number, core)
        self.mlp = build_mlp(config)
        self.dropout = Dropout(config.hidden_dropout)
        width = config.hidden_size
        if config.norm_order == "post":
            self.attention_output_norm = build_norm(config, width)
            self.mlp_output_norm = build_norm(config, width)
        else:
            is_normalized = number == 0 and config.embedding_norm
            self.attention_norm = nn.Identity() if is_normalized else build_norm(config, width)
            self.mlp_norm = build_norm(config, width)
        self._branches = self._post if config.norm_order == "post" else self._pre

    def forward(self, x_BTD: Tensor, rotary: Tables | None = None, within: Within = None) -> Tensor:
        """The residual stream (B, T, D) after this layer."""
        return self._branches(x_BTD, partial(self.attention, rotary=rotary, documents=within))

    def _post(self, x_BTD: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        x_BTD, _ = self.attention_output_norm(self.dropout(attend(x_BTD)), x_BTD)
        y_BTD: Tensor = self.mlp_output_norm(self.dropout(self.mlp(x_BTD)), x_BTD)[0]
        return y_BTD

    def _pre(self, x_BTD: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        normalized_BTD, x_BTD = self.mlp_norm(self.dropout(attend(self.attention_norm(x_BTD))), x_BTD)
        y_BTD: Tensor = self.dropout(self.mlp(normalized_BTD), x_BTD)
        return y_BTD


class Bert(TokenModel):
    """A masked language model, or the part of one that a pipeline stage holds.

    The loss "lm" is the cross entropy of `labels` (B, T), all in [0, vocab_size), weighted by `loss_mask`. With a
    sentence head there is "sentence" too: that of `is_random` (B), 1 where the two texts of a row are not in order, and
    -1 where there are no two. `token_types` (B, T) default to 0, `position_ids` (B or 1, T) to 0, 1, ...
    With `cu_seqlens` (B, N; integers on the host: 0, the end of each text, then T to the end of the row) attention
    stays inside each text: those of packed documents, or a text and its padding; else `padding_mask` (B, T), 0 where
    there is padding, hides that.
    A stage is built by naming what it holds; with tied weights that with the head has the token embedding too.
    """

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
        self.loss_weights: Mapping[str, float] = MappingProxyType(
            {"lm": 1.0, "sentence": 1.0} if config.has_sentence_head else {"lm": 1.0}
        )
        if has_embedding or (has_head and config.tied):
            self.embedding = EncoderEmbedding(config, rows, tokens_only=not has_embedding)
        numbers = range(config.num_layers) if layers is None else layers
        self.layer_runner = run_in_order
        self.layers = nn.ModuleDict({str(number): EncoderLayer(config, number) for number in numbers})
        if has_head:
            is_normalized = config.norm_order == "post"
            self.final_norm = nn.Identity() if is_normalized else build_norm(config, config.hidden_size)
            self.lm_head = TokenTransform(config)
            self.head = TiedHead() if config.tied else OutputHead(config.embedding_width, rows)
            self.head_bias = OutputBias(rows)
            self.token_loss = TokenLoss(vocab_size)
            self.full_logits = FullLogits(vocab_size)
            if config.has_sentence_head:
                self.sentence_head = SentenceHead(config)

    def embed(self, batch: Batch) -> Stream:
        """The residual stream (B, T, D) before the first layer, of `tokens` (B, T)."""
        seed_part(self._seed(batch), "embedding")
        return (self.embedding(batch["tokens"], position_ids(batch), batch.get("token_types")),)

    def run_layers(self, stream: Stream, batch: Batch, cache: Past | None = None) -> Stream:
        """The residual stream (B, T, D) after the layers that this module holds.

        Raises:
            ConfigError: with a `cache`: what is stored of a position would change with those after it.
        """
        if cache is not None:
            raise ConfigError(
                f"model_family={self.config.model_family} fills in masked tokens and continues no text; "
                "load a decoder (model_family=gpt)"
            )
        rotary, within = RotaryTables.of(self.config, position_ids(batch)), within_of(batch, stream[0].device)
        seed, steps = self._seed(batch), []
        for number, layer in self.layers.items():
            tables = None if rotary is None else rotary.of_layer(self.config.window_of(int(number)) is not None)
            step: LayerStep = partial(_run_layer, layer, tables, within)
            steps.append(seeded_layer(step, seed, number))
        return self.layer_runner(steps, stream)

    def losses(self, stream: Stream, batch: Batch) -> Losses:
        """The weighted losses of all tokens (B, T), and of all pairs of texts (B), float32, nats."""
        x_BTD = self.final_norm(stream[0])
        found = self.token_losses(self.lm_head(x_BTD), batch)
        if self.config.has_sentence_head:
            scores_B2, labels_B = self.sentence_head(x_BTD).float(), batch["is_random"]
            losses_B = F.cross_entropy(scores_B2, labels_B.clamp_min(0), reduction="none")
            found["sentence"] = weighted_losses(losses_B, labels_B >= 0)
        return found

    def counts(self, batch: Batch) -> Losses:
        """The weight of each token (B, T); every pair of texts (B) has one."""
        found = self.token_counts(batch)
        if self.config.has_sentence_head:
            found["sentence"] = (batch["is_random"] >= 0).float()
        return found

    def read_by_head(self, stream: Stream) -> Tensor:
        """What the transform makes of the last layer's output (B, T, E)."""
        x_BTE: Tensor = self.lm_head(self.final_norm(stream[0]))
        return x_BTE

    def sentence_logits(self, stream: Stream) -> Tensor:
        """Scores (B, 2) of a row's texts being in order, and of not being so."""
        scores_B2: Tensor = self.sentence_head(self.final_norm(stream[0]))
        return scores_B2

    def stream_shapes(self, rows: int, length: int, parts: int = 1) -> tuple[tuple[int, ...], ...]:
        """That of the residual stream."""
        return ((rows, length // parts, self.config.hidden_size),)

    def _head(self) -> Head:
        head: Head = partial(self.head, embedding=self.embedding.tokens) if self.config.tied else self.head
        return partial(self.head_bias, head=head)


def _run_layer(layer: nn.Module, rotary: Tables | None, within: Within, stream: Stream) -> Stream:
    return (layer(stream[0], rotary=rotary, within=within),)


def within_of(batch: Batch, device: torch.device) -> Within:
    """What of its row a position sees; the same for all layers."""
    cu_seqlens_BN, padding_mask_BT = batch.get("cu_seqlens"), batch.get("padding_mask")
    if cu_seqlens_BN is not None:
        return Documents.of_batch(cu_seqlens_BN, device)
    return None if padding_mask_BT is None else Padding(padding_mask_BT != 0)
