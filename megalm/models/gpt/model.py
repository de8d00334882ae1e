"""Decoder-only Transformer: GPT-2 style and Llama style from the same blocks.

Shapes: B batch, T sequence, N = T + 1 room for cumulative document lengths, D model width, V padded vocabulary,
R rotary width.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.kernels.rotary import rotary_tables
from megalm.models.blocks.attention import Attention, KVCache, LayerCache, RotaryTables
from megalm.models.blocks.documents import Documents
from megalm.models.blocks.layers import Dropout, Embedding, FullLogits, TiedHead, TokenLoss, build_norm
from megalm.models.blocks.mlp import build_mlp
from megalm.models.blocks.randomness import seeded
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


LayerStep = Callable[[Tensor], Tensor]
LayerRunner = Callable[[Sequence[LayerStep], Tensor], Tensor]
"""Takes the residual stream (B, T, D) through layers."""


def run_in_order(steps: Sequence[LayerStep], x_BTD: Tensor) -> Tensor:
    """The residual stream (B, T, D) after all `steps`, one after the other."""
    for step in steps:
        x_BTD = step(x_BTD)
    return x_BTD


class GPT(nn.Module):
    """A decoder-only language model, or the part of one that a pipeline stage holds.

    The whole is `embed`, then `run_layers`, then `logits` or `token_losses`; `forward` calls these. A stage is built
    by naming the layers that it holds and whether it holds the embedding and the head; parameter names are those of the
    whole model. With tied weights the stage that holds the head holds the token embedding too (its own copy, under the
    same name).

    `padded_vocab_size` is the number of embedding rows (default: padding for one device). Columns past
    `config.vocab_size` get neither probability nor gradient.
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
        assert config.vocab_size is not None, "vocab_size is filled from the tokenizer before the model is built"
        rows = config.padded_vocab_size() if padded_vocab_size is None else padded_vocab_size
        assert rows >= config.vocab_size, f"padded_vocab_size={rows} is less than vocab_size={config.vocab_size}"
        self.config = config
        self.draws = config.attention_dropout > 0 or config.hidden_dropout > 0
        if has_embedding or (has_head and config.tied):
            self.embedding = Embedding(config, rows, with_positions=has_embedding)
        numbers = range(config.num_layers) if layers is None else layers
        self.layer_runner: LayerRunner = run_in_order
        self.layers = nn.ModuleDict({str(number): TransformerLayer(config) for number in numbers})
        if has_head:
            self.final_norm = build_norm(config, config.hidden_size)
            self.head = TiedHead() if config.tied else nn.Linear(config.hidden_size, rows, bias=False)
            self.token_loss = TokenLoss(config.vocab_size)
            self.full_logits = FullLogits(config.vocab_size)

    def forward(
        self,
        tokens_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        labels_BT: Tensor | None = None,
        cache: KVCache | None = None,
        cu_seqlens_BN: Tensor | None = None,
        dropout_seed: int | None = None,
    ) -> Tensor:
        """Losses (B, T), float32, where `labels_BT` is given, else logits (B, T, V).

        `position_ids_BT` defaults to 0, 1, ... after what `cache` holds. `labels_BT` holds the next token of each
        position, all in [0, vocab_size): mask the losses, not the labels. With `cu_seqlens_BN` (integers on the host:
        0, the end of each document, then T to the end of the row) attention stays inside each document. With
        `dropout_seed` embedding and layers draw from it and their number, so that a layer drops the same in a stage.
        """
        if position_ids_BT is None:
            start = 0 if cache is None else cache.length
            position_ids_BT = torch.arange(start, start + tokens_BT.shape[1], device=tokens_BT.device)[None]
        x_BTD = self.embed(tokens_BT, position_ids_BT, dropout_seed)
        x_BTD = self.run_layers(x_BTD, position_ids_BT, cache, cu_seqlens_BN, dropout_seed)
        return self.logits(x_BTD) if labels_BT is None else self.token_losses(x_BTD, labels_BT)

    def embed(self, tokens_BT: Tensor, position_ids_BT: Tensor, dropout_seed: int | None = None) -> Tensor:
        """The residual stream (B, T, D) before the first layer; positions (B or 1, T)."""
        if dropout_seed is not None and self.draws:
            torch.manual_seed(stable_seed(dropout_seed, "embedding"))
        x_BTD: Tensor = self.embedding(tokens_BT, position_ids_BT)
        return x_BTD

    def run_layers(
        self,
        x_BTD: Tensor,
        position_ids_BT: Tensor,
        cache: KVCache | None = None,
        cu_seqlens_BN: Tensor | None = None,
        dropout_seed: int | None = None,
    ) -> Tensor:
        """The residual stream (B, T, D) after the layers that this module holds; arguments as in `forward`."""
        rotary = self.rotary(position_ids_BT)
        documents = None if cu_seqlens_BN is None else Documents.of_batch(cu_seqlens_BN, x_BTD.device)
        steps: list[Callable[[Tensor], Tensor]] = []
        for number, layer in self.layers.items():
            kept = None if cache is None else cache.layer(int(number))
            step: LayerStep = partial(layer, rotary=rotary, cache=kept, documents=documents)
            if dropout_seed is not None and self.draws:
                # inside the step, so that recomputing it draws the same
                step = seeded(step, stable_seed(dropout_seed, "layer", number))
            steps.append(step)
        return self.layer_runner(steps, x_BTD)

    def rotary(self, position_ids_BT: Tensor) -> RotaryTables | None:
        """Cosines and sines (B or 1, T, R/2) for the layers, or None without rotary positions."""
        config = self.config
        if config.position_embedding_type != "rope":
            return None
        factor = config.rotary_seq_len_interpolation_factor
        return rotary_tables(position_ids_BT, config.rotary_dim, config.rotary_base, factor)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Logits (B, T, V) from the last layer's output; padded vocabulary columns are -inf."""
        logits_BTV: Tensor = self.full_logits(self._head(x_BTD))
        return logits_BTV

    def token_losses(self, x_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """Losses (B, T), float32, nats, from the last layer's output."""
        losses_BT: Tensor = self.token_loss(self._head(x_BTD), labels_BT)
        return losses_BT

    def _head(self, x_BTD: Tensor) -> Tensor:
        x_BTD = self.final_norm(x_BTD)
        logits_BTV: Tensor = self.head(x_BTD, self.embedding.tokens) if self.config.tied else self.head(x_BTD)
        return logits_BTV
