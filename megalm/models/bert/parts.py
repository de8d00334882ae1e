"""The beginning and the end of an encoder: embeddings, and what makes predictions of hidden states.

Shapes: B batch, T sequence, D model width, E embedding width, V padded vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.kernels.backend import REFERENCE, Kernels
from megalm.models.blocks.dropout import Dropout
from megalm.models.blocks.embedding import EmbeddingTable, TokenEmbedding
from megalm.models.blocks.norm import build_norm

Activation = Callable[[Tensor], Tensor]


def activation_of(name: str, kernels: Kernels) -> Activation:
    """An activation of `kernels`; ReLU and SiLU are torch's own."""
    own: dict[str, Activation] = {"relu": F.relu, "silu": F.silu}
    found: Activation = own.get(name) or getattr(kernels, name)
    return found


class EncoderEmbedding(nn.Module):
    """The sum of the embeddings of tokens, positions and token types, normalized, dropped, projected to D.

    What the configuration lacks of these is left out. `tokens_only`: a pipeline stage that needs the tied weights.
    """

    def __init__(self, config: ModelConfig, padded_vocab_size: int, *, tokens_only: bool = False) -> None:
        super().__init__()
        width, self.position_offset = config.embedding_width, config.position_embedding_offset
        self.tokens = TokenEmbedding(padded_vocab_size, width)
        if tokens_only:
            return
        self.positions: EmbeddingTable | None = None
        if config.position_embedding_type == "learned_absolute":
            length = config.max_position_embeddings
            assert length is not None, "max_position_embeddings is filled from seq_length before the model is built"
            self.positions = EmbeddingTable(length + self.position_offset, width)
        self.token_types = EmbeddingTable(config.num_tokentypes, width) if config.num_tokentypes else None
        self.norm = build_norm(config, width) if config.embedding_norm else nn.Identity()
        self.dropout = Dropout(config.hidden_dropout)
        is_projected = width != config.hidden_size
        self.projection = nn.Linear(width, config.hidden_size) if is_projected else nn.Identity()

    def forward(self, tokens_BT: Tensor, position_ids_BT: Tensor, token_types_BT: Tensor | None) -> Tensor:
        """Residual stream (B, T, D); positions may have B = 1, and without token types all are of type 0."""
        x_BTE = self.tokens(tokens_BT)
        if self.token_types is not None:
            types_BT = torch.zeros_like(tokens_BT[:1]) if token_types_BT is None else token_types_BT
            x_BTE = x_BTE + self.token_types(types_BT)
        if self.positions is not None:
            x_BTE = x_BTE + self.positions(position_ids_BT + self.position_offset)
        y_BTD: Tensor = self.projection(self.dropout(self.norm(x_BTE)))
        return y_BTD


class TokenTransform(nn.Module):
    """norm(activation(dense(x))): what the output head gets of hidden states.

    Source: google-research/bert, run_pretraining.py, `get_masked_lm_output`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.embedding_width, bias=config.linear_bias)
        self.norm = build_norm(config, config.embedding_width)
        self._activation = config.activation
        self.use_kernels(REFERENCE)

    def use_kernels(self, kernels: Kernels) -> None:
        """Take the activation from `kernels`."""
        self.function = activation_of(self._activation, kernels)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, E)."""
        y_BTE: Tensor = self.norm(self.function(self.dense(x_BTD)))
        return y_BTE


class SentenceHead(nn.Module):
    """Whether two texts stand in their order, from the hidden state of a row's first token.

    Source: Devlin et al. 2019, arXiv:1810.04805, section 3.1, task 2; pooler as in google-research/bert, modeling.py.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 2)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Scores (B, 2)."""
        scores_B2: Tensor = self.classifier(torch.tanh(self.pooler(x_BTD[:, 0])))
        return scores_B2
