"""Small modules of the Transformer: norms, embeddings, the tied output head, and the loss at the end.

Linear layers are torch's `nn.Linear` and embeddings are `nn.Embedding`s, so that parallel ones can take their place by
name. Shapes: B batch, T sequence, D model width, V padded vocabulary.
"""

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.kernels.choice import REFERENCE, Kernels
from megalm.kernels.dropout import WHOLE


class LayerNorm(nn.Module):
    """Layer normalization of the last dim; with `offset` 1.0 the weight is stored as its distance from one.

    `module(x)` is the normalized x, same shape and dtype; `module(x, residual)` is that of the sum, and the sum.
    """

    def __init__(self, size: int, epsilon: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.bias = nn.Parameter(torch.zeros(size))
        self.epsilon = epsilon
        self.offset = offset
        self.kernels = REFERENCE

    def use_kernels(self, kernels: Kernels) -> None:
        """Call these kernels from now on."""
        self.kernels = kernels

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalized x, or (normalized x + residual, x + residual)."""
        if residual is None:
            return self.kernels.layer_norm(x, self._scale(), self.bias, self.epsilon)
        return self.kernels.layer_norm_after_add(x, residual, self._scale(), self.bias, self.epsilon)

    def of_sum(self, total: Tensor) -> tuple[Tensor, Tensor]:
        """(normalized `total`, `total`): as `forward` of two terms with this sum, gradients equal to the bit."""
        return self.kernels.layer_norm_after_add(total, None, self._scale(), self.bias, self.epsilon)

    def _scale(self) -> Tensor:
        # 1 + w is rounded to float32, not to bfloat16, which could not tell 1 + 2^-9 from 1.
        return self.weight.float() + self.offset if self.offset else self.weight


class RMSNorm(nn.Module):
    """Root-mean-square normalization of the last dim; called as `LayerNorm` is."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon
        self.kernels = REFERENCE

    def use_kernels(self, kernels: Kernels) -> None:
        """Call these kernels from now on."""
        self.kernels = kernels

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalized x, or (normalized x + residual, x + residual)."""
        if residual is None:
            return self.kernels.rms_norm(x, self.weight, self.epsilon)
        return self.kernels.rms_norm_after_add(x, residual, self.weight, self.epsilon)

    def of_sum(self, total: Tensor) -> tuple[Tensor, Tensor]:
        """(normalized `total`, `total`): as `forward` of two terms with this sum, gradients equal to the bit."""
        return self.kernels.rms_norm_after_add(total, None, self.weight, self.epsilon)


@runtime_checkable
class UsesKernels(Protocol):
    """A module that calls operators of which there are several implementations."""

    def use_kernels(self, kernels: Kernels) -> None:
        """Call these kernels from now on."""


def use_kernels(model: nn.Module, kernels: Kernels) -> None:
    """Let every module of `model` call these kernels (a model is built with the references)."""
    for module in model.modules():
        if isinstance(module, UsesKernels):
            module.use_kernels(kernels)


def build_norm(config: ModelConfig, size: int) -> nn.Module:
    """The normalization that the configuration names, for a last dim of `size`."""
    if config.normalization == "RMSNorm":
        return RMSNorm(size, config.norm_epsilon)
    return LayerNorm(size, config.norm_epsilon, offset=1.0 if config.apply_layernorm_1p else 0.0)


class Dropout(nn.Dropout):
    """Dropout of the residual stream or of a branch, which may be added to the stream at once.

    `module(x)` is the dropped x, same shape and dtype; `module(x, residual)` is residual + that.
    """

    part = WHOLE
    """Which part of the sequence this rank has: the mask is that of the whole."""

    def __init__(self, p: float) -> None:
        super().__init__(p)
        self.kernels = REFERENCE

    def use_kernels(self, kernels: Kernels) -> None:
        """Call these kernels from now on."""
        self.kernels = kernels

    def forward(self, x_BTD: Tensor, residual_BTD: Tensor | None = None) -> Tensor:
        """Elements zeroed at random and the others scaled by 1 / (1 - p), when training; + residual."""
        if not self.training or self.p == 0.0:
            return x_BTD if residual_BTD is None else residual_BTD + x_BTD
        return self.kernels.dropout_add(x_BTD, residual_BTD, self.p, self.part)


class TokenEmbedding(nn.Embedding):
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
    """Token embeddings, plus position embeddings where the positions are learned, then dropout.

    `with_positions` False leaves the table of positions out (a pipeline stage that only needs the tied weights).
    """

    def __init__(self, config: ModelConfig, padded_vocab_size: int, with_positions: bool = True) -> None:
        super().__init__()
        self.tokens = TokenEmbedding(padded_vocab_size, config.hidden_size)
        if with_positions and config.position_embedding_type == "learned_absolute":
            length = config.max_position_embeddings
            assert length is not None, "max_position_embeddings is filled from seq_length before the model is built"
            self.positions: nn.Embedding | None = nn.Embedding(length, config.hidden_size)
        else:
            self.positions = None
        self.dropout = Dropout(config.hidden_dropout)

    def forward(self, tokens_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
        """Residual stream (B, T, D) of tokens at their positions; the positions may have B = 1."""
        x_BTD = self.tokens(tokens_BT)
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(position_ids_BT)
        y_BTD: Tensor = self.dropout(x_BTD)
        return y_BTD


class TiedHead(nn.Module):
    """Output head without weights of its own: it multiplies by the token embedding's.

    The weight is read inside this module's forward, from the embedding that the caller passes. That is what makes
    ZeRO-3 right: it sees an access outside the owner and from then on gathers the weight for this module too, in
    forward and backward. A second registration of the parameter would not survive `to_empty`.
    """

    def forward(self, x_BTD: Tensor, embedding: nn.Module) -> Tensor:
        """Logits (B, T, V)."""
        weight_VD = embedding.weight
        assert isinstance(weight_VD, Tensor), "the embedding of a tied head owns a weight"
        return F.linear(x_BTD, weight_VD)


class TokenLoss(nn.Module):
    """Cross entropy of each token, in float32; padded vocabulary columns take no part."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.kernels = REFERENCE

    def use_kernels(self, kernels: Kernels) -> None:
        """Call these kernels from now on."""
        self.kernels = kernels

    def forward(self, logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
        """Losses (B, T), float32, nats; every label must lie in [0, vocab_size)."""
        return self.kernels.cross_entropy(logits_BTV, labels_BT, self.vocab_size)


class FullLogits(nn.Module):
    """Logits as a caller may use them: padded vocabulary columns are -inf and pass no gradient."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, logits_BTV: Tensor) -> Tensor:
        """The same logits (B, T, V), padding set to -inf."""
        padding = logits_BTV.shape[-1] - self.vocab_size
        if padding == 0:
            return logits_BTV
        return F.pad(logits_BTV[..., : self.vocab_size], (0, padding), value=float("-inf"))
