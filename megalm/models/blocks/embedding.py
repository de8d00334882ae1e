"""Embeddings of tokens and of learned positions. Shapes: B batch, T sequence, D model width."""

import torch
from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.kernels.backend import REFERENCE, Kernels
from megalm.models.blocks.dropout import Dropout
from megalm.models.contract import Batch


class EmbeddingTable(nn.Embedding):
    """Rows by number, without torch's initial values on the meta device: their draw there loads torch's compiler."""

    def reset_parameters(self) -> None:
        """Torch's initial values, where there is memory for them; a run draws its own (see materialize.py)."""
        if not self.weight.is_meta:
            super().reset_parameters()


class TokenEmbedding(EmbeddingTable):
    """Rows of a table by token id."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width)
        self.kernels = REFERENCE

    def use_kernels(self, kernels: Kernels) -> None:
        """Call these kernels from now on."""
        self.kernels = kernels

    def forward(self, tokens: Tensor) -> Tensor:
        """Shape tokens.shape + (D,)."""
        return self.kernels.embedding(tokens, self.weight)


class Embedding(nn.Module):
    """Token embeddings, scaled if asked for, plus position embeddings where those are learned, then dropout.

    `with_positions` False leaves the table of positions out (a pipeline stage that only needs the tied weights).
    """

    def __init__(self, config: ModelConfig, padded_vocab_size: int, with_positions: bool = True) -> None:
        super().__init__()
        self.tokens = TokenEmbedding(padded_vocab_size, config.hidden_size)
        if with_positions and config.position_embedding_type == "learned_absolute":
            length = config.max_position_embeddings
            assert length is not None, "max_position_embeddings is filled from seq_length before the model is built"
            rows = length + config.position_embedding_offset
            self.positions: EmbeddingTable | None = EmbeddingTable(rows, config.hidden_size)
        else:
            self.positions = None
        self.position_offset = config.position_embedding_offset
        self.scale = config.hidden_size**0.5 if config.scale_embeddings else 1.0
        self.dropout = Dropout(config.hidden_dropout)

    def forward(self, tokens_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
        """Residual stream (B, T, D) of tokens at their positions; the positions may have B = 1."""
        x_BTD = self.tokens(tokens_BT)
        if self.scale != 1.0:
            x_BTD = x_BTD * self.scale
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(position_ids_BT + self.position_offset)
        y_BTD: Tensor = self.dropout(x_BTD)
        return y_BTD


def vocabulary_sizes(config: ModelConfig, padded_vocab_size: int | None) -> tuple[int, int]:
    """(token ids, rows of the tables of them): by default padded for one device."""
    assert config.vocab_size is not None, "vocab_size is filled from the tokenizer before the model is built"
    rows = config.padded_vocab_size() if padded_vocab_size is None else padded_vocab_size
    assert rows >= config.vocab_size, f"padded_vocab_size={rows} is less than vocab_size={config.vocab_size}"
    return config.vocab_size, rows


def tied_tables(config: ModelConfig) -> tuple[str, ...]:
    """The parameters that embedding and head share."""
    return ("embedding.tokens.weight",) if config.tied else ()


def position_ids(batch: Batch) -> Tensor:
    """The positions of the tokens, (B or 1, T)."""
    position_ids_BT, tokens_BT = batch.get("position_ids"), batch["tokens"]
    if position_ids_BT is not None:
        return position_ids_BT
    return torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
