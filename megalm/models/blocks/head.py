"""The end of a language model: the output head, the loss of tokens, and logits for who wants them.

`TokenLoss` gets hidden states and labels and calls the head itself: a loss that never holds all logits can take the
place of both by its name, and reads the head's weight. Shapes: B batch, T sequence, D model width, V padded vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from megalm.kernels.backend import REFERENCE, Kernels


@dataclass(frozen=True)
class Head:
    """The output head of a model, as its loss sees it."""

    project: Callable[[Tensor], Tensor]
    """Hidden states (B, T, D) to logits (B, T, V), or on a tensor-parallel rank to its columns of them."""
    owner: nn.Module
    """The module whose `weight` (V, D) it is; to be read inside a forward, where ZeRO-3 gathers it."""


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
    """Cross entropy of each token from hidden states, in float32; padded vocabulary columns take no part."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.kernels = REFERENCE

    def use_kernels(self, kernels: Kernels) -> None:
        """Call these kernels from now on."""
        self.kernels = kernels

    def forward(self, x_BTD: Tensor, labels_BT: Tensor, head: Head) -> Tensor:
        """Losses (B, T), float32, nats; every label must lie in [0, vocab_size)."""
        return self.kernels.cross_entropy(head.project(x_BTD), labels_BT, self.vocab_size)


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
