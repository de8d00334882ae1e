"""Decoder-only Transformer: the published decoders, from GPT-2 to Gemma 3, from the same blocks.

Shapes: B batch, T sequence, N = T + 1 room for cumulative document lengths, D model width, V padded vocabulary,
R rotary width.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.models.blocks.attention import LayerCache
from megalm.models.blocks.documents import Documents
from megalm.models.blocks.dropout import Dropout
from megalm.models.blocks.embedding import Embedding, position_ids, vocabulary_sizes
from megalm.models.blocks.head import FullLogits, Head, OutputHead, TiedHead, TokenLoss
from megalm.models.blocks.loss import weighted_losses
from megalm.models.blocks.mlp import build_mlp
from megalm.models.blocks.norm import build_norm
from megalm.models.blocks.randomness import seed_part, seeded_layer
from megalm.models.blocks.rotary import RotaryTables, Tables
from megalm.models.blocks.segments import LayerMemory, SegmentMemory, build_attention
from megalm.models.contract import Batch, LayerStep, Losses, Past, Stream, run_in_order
from megalm.models.gpt.mtp import PredictionModule, shifted, weights_ahead
from megalm.models.token_model import TokenModel


class TransformerLayer(nn.Module):
    """Attention and MLP, each a branch that is added to the residual stream.

    With f the branch: x + f(norm(x)) ("pre": Xiong et al. 2020, arXiv:2002.04745), x + norm(f(x)) ("branch": OLMo 2,
    arXiv:2501.00656), x + norm(f(norm(x))) ("sandwich": Ding et al. 2021, arXiv:2105.13290); or both branches of one
    x, x + attention(norm(x)) + mlp(norm(x)) (Black et al. 2022, arXiv:2204.06745).
    """

    def __init__(self, config: ModelConfig, number: int = 0) -> None:
        super().__init__()
        before, after = config.norm_order != "branch", config.norm_order != "pre"
        width = config.hidden_size
        self.attention_norm = build_norm(config, width) if before else nn.Identity()
        self.attention = build_attention(config, number)
        self.mlp_norm = build_norm(config, width) if before else nn.Identity()
        self.mlp = build_mlp(config)
        if after:
            self.attention_output_norm = build_norm(config, width)
            self.mlp_output_norm = build_norm(config, width)
        self.dropout = Dropout(config.hidden_dropout)
        self._branches = self._parallel if config.use_parallel_residual else self._after if after else self._before

    def forward(
        self,
        x_BTD: Tensor,
        rotary: Tables | None = None,
        cache: LayerCache | None = None,
        documents: Documents | None = None,
        memory: LayerMemory | None = None,
    ) -> Tensor:
        """The residual stream (B, T, D) after this layer; `rotary` is of the positions of the memory too."""
        attend = partial(self._attend, memory=memory, rotary=rotary, cache=cache, documents=documents)
        return self._branches(x_BTD, attend)

    def _attend(self, x_BTD: Tensor, *, memory: LayerMemory | None, **around: Any) -> Tensor:
        """What attention makes of the stream, and of what the memory holds before it."""
        seen_BSD = x_BTD if memory is None else memory.extended(x_BTD)
        before = seen_BSD.shape[1] - x_BTD.shape[1]
        y_BTD: Tensor = self.attention(self.attention_norm(seen_BSD), before=before, **around)
        return y_BTD

    def _before(self, x_BTD: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        branch_BTD = self.dropout(attend(x_BTD))
        normalized_BTD, x_BTD = self.mlp_norm(branch_BTD, x_BTD)
        y_BTD: Tensor = self.dropout(self.mlp(normalized_BTD), x_BTD)
        return y_BTD

    def _after(self, x_BTD: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        x_BTD = self.dropout(self.attention_output_norm(attend(x_BTD)), x_BTD)
        y_BTD: Tensor = self.dropout(self.mlp_output_norm(self.mlp(self.mlp_norm(x_BTD))), x_BTD)
        return y_BTD

    def _parallel(self, x_BTD: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        y_BTD = self.dropout(attend(x_BTD), x_BTD)
        return cast(Tensor, self.dropout(self.mlp(self.mlp_norm(x_BTD)), y_BTD))


class GPT(TokenModel):
    """A decoder-only language model, or the part of one that a pipeline stage holds.

    A stage is built by naming the layers that it holds and whether it holds the embedding and the head. With tied
    weights the stage that holds the head holds the token embedding too (its own copy, under the same name).

    Its loss "lm" is the cross entropy of `labels` (B, T), all in [0, vocab_size), weighted by `loss_mask`: mask the
    losses, not the labels. With multi-token prediction "mtp_1", "mtp_2", ... are those of the labels so many positions
    further on, with the same embeddings and the same head.
    `position_ids` (B or 1, T) default to 0, 1, ... With `cu_seqlens` (B, N; integers on the host: 0, the end of each
    document, then T to the end of the row) attention stays inside each document; with `prefix_lengths` (B, T, or B, 1
    for whole rows; integers on the host) the first so many tokens of each see one another.
    With segment recurrence (`config.segment_memory`) batches are segments, of which a `SegmentMemory` makes one text.
    Columns of logits past `config.vocab_size` get neither probability nor gradient.
    """

    loss_weights: Mapping[str, float] = MappingProxyType({"lm": 1.0})

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
        depths = range(1, config.mtp_num_layers + 1)
        if depths:
            ahead = dict.fromkeys((f"mtp_{depth}" for depth in depths), config.mtp_loss_scaling_factor / len(depths))
            self.loss_weights = MappingProxyType({**self.loss_weights, **ahead})
        if has_embedding or (has_head and config.tied):
            self.embedding = Embedding(config, rows, with_positions=has_embedding)
        numbers = range(config.num_layers) if layers is None else layers
        self.layer_runner = run_in_order
        self.layers = nn.ModuleDict({str(number): TransformerLayer(config, number) for number in numbers})
        if has_head:
            self.final_norm = build_norm(config, config.hidden_size)
            self.head = TiedHead() if config.tied else OutputHead(config.hidden_size, rows)
            self.token_loss = TokenLoss(vocab_size)
            self.full_logits = FullLogits(vocab_size)
            if depths:
                modules = [PredictionModule(config, TransformerLayer(config, config.num_layers - 1)) for _ in depths]
                self.mtp_layers = nn.ModuleList(modules)

    def embed(self, batch: Batch) -> Stream:
        """The residual stream (B, T, D) before the first layer, of `tokens` (B, T)."""
        seed_part(self._seed(batch), "embedding")
        return (self.embedding(batch["tokens"], position_ids(batch)),)

    def run_layers(self, stream: Stream, batch: Batch, cache: Past | None = None) -> Stream:
        """The residual stream (B, T, D) after the layers that this module holds."""
        (x_BTD,) = stream
        memory, cache = (cache, None) if isinstance(cache, SegmentMemory) else (None, cache)
        positions_BS = position_ids(batch) if memory is None else memory.positions(x_BTD)
        rotary, documents = RotaryTables.of(self.config, positions_BS), _documents(batch, x_BTD.device)
        memories = {} if memory is None else {number: memory.layer(int(number)) for number in self.layers}
        seed, steps = self._seed(batch), []
        for number, layer in self.layers.items():
            kept = None if cache is None else cache.layer(int(number))
            tables = None if rotary is None else rotary.of_layer(self.config.window_of(int(number)) is not None)
            step: LayerStep = partial(_run_layer, layer, tables, kept, documents, memories.get(number))
            steps.append(seeded_layer(step, seed, number))
        stream = self.layer_runner(steps, stream)
        if memory is not None:
            memory.advance({int(number): layer_memory.after for number, layer_memory in memories.items()})
        return stream

    def losses(self, stream: Stream, batch: Batch) -> Losses:
        """The weighted losses of all tokens (B, T), float32, nats."""
        h_BTD = self.read_by_head(stream)
        found = self.token_losses(h_BTD, batch)
        return found | self._losses_ahead(h_BTD, batch) if self.config.mtp_num_layers else found

    def counts(self, batch: Batch) -> Losses:
        """The weight of each token (B, T)."""
        depths = range(1, self.config.mtp_num_layers + 1)
        return self.token_counts(batch) | {f"mtp_{depth}": weights_ahead(batch, depth) for depth in depths}

    def read_by_head(self, stream: Stream) -> Tensor:
        """The normalized output of the last layer (B, T, D)."""
        h_BTD: Tensor = self.final_norm(stream[0])
        return h_BTD

    def stream_shapes(self, rows: int, length: int, parts: int = 1) -> tuple[tuple[int, ...], ...]:
        """That of the residual stream."""
        return ((rows, length // parts, self.config.hidden_size),)

    def _losses_ahead(self, h_BTD: Tensor, batch: Batch) -> Losses:
        """Of each prediction module."""
        rotary, documents = RotaryTables.of(self.config, position_ids(batch)), _documents(batch, h_BTD.device)
        is_windowed = self.config.window_of(self.config.num_layers - 1) is not None  # as the last layer
        tables = None if rotary is None else rotary.of_layer(is_windowed)
        seed, found = self._seed(batch), {}
        for depth, module in enumerate(self.mtp_layers, 1):
            seed_part(seed, "mtp", depth)
            tokens_BT, positions_BT = (shifted(x, depth) for x in (batch["tokens"], position_ids(batch)))
            ahead_BTD = self.embedding(tokens_BT, positions_BT)
            h_BTD = module(h_BTD, ahead_BTD, lambda layer, x_BTD: layer(x_BTD, rotary=tables, documents=documents))
            losses_BT = self.token_loss(h_BTD, shifted(batch["labels"], depth), self._head())
            found[f"mtp_{depth}"] = weighted_losses(losses_BT, weights_ahead(batch, depth))
        return found

    def _head(self) -> Head:
        head: Head = partial(self.head, embedding=self.embedding.tokens) if self.config.tied else self.head
        softcap = self.config.final_logit_softcapping
        return head if softcap is None else partial(_softcapped, head, softcap)


def _softcapped(head: Head, softcap: float, x_BTD: Tensor) -> Tensor:
    """Capped logits; a loss without all logits does not know them (`cross_entropy_impl`)."""
    return torch.tanh(head(x_BTD) / softcap) * softcap


def _documents(batch: Batch, device: torch.device) -> Documents | None:
    """What of its row a position sees; None: all that is before it."""
    cu_seqlens_BN, prefix_lengths = batch.get("cu_seqlens"), batch.get("prefix_lengths")
    if cu_seqlens_BN is None:
        if prefix_lengths is None:
            return None
        B, T = batch["tokens"].shape
        cu_seqlens_BN = torch.tensor([0, T], dtype=torch.int32).expand(B, 2)
    return Documents.of_batch(cu_seqlens_BN, device, prefix_lengths)


def _run_layer(
    layer: nn.Module,
    rotary: Tables | None,
    cache: LayerCache | None,
    documents: Documents | None,
    memory: LayerMemory | None,
    stream: Stream,
) -> Stream:
    return (layer(stream[0], rotary=rotary, cache=cache, documents=documents, memory=memory),)
