"""The end of a language model: the output head, the loss of tokens, and logits for who wants them.

`TokenLoss` gets hidden states and labels and calls the head itself, either for logits or for a loss that never holds
them all and reads the head's weight. Shapes: B batch, T sequence, D model width, V padded vocabulary.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.kernels.backend import REFERENCE, Kernels
from megalm.kernels.divergence import forward_kl

HeadUse = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""What is made of hidden states (B, T, D), the head's weight (V, D) and the bias of logits (V), where there is one, all
as a tensor-parallel rank has them."""
Head = Callable[..., Tensor]
"""`head(x_BTD)` are the logits, `head(x_BTD, use=HeadUse)` what `use` makes of hidden states and weight. It runs inside
the forward of the head's module: that is where inputs enter the tensor-parallel region and ZeRO-3 gathers weights."""


def project(x_BTD: Tensor, weight_VD: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """Logits (B, T, V)."""
    return F.linear(x_BTD, weight_VD, bias_V)


class OutputHead(nn.Linear):
    """Output head with weights of its own."""

    def __init__(self, width: int, rows: int) -> None:
        super().__init__(width, rows, bias=False)

    def forward(self, x_BTD: Tensor, use: HeadUse = project, bias_V: Tensor | None = None) -> Tensor:
        """Logits (B, T, V), or what `use` makes of hidden states, weight and bias."""
        return use(x_BTD, self.weight, bias_V)


class TiedHead(nn.Module):
    """Output head without weights of its own: it multiplies by the token embedding's.

    The weight is read inside this module's forward, from the embedding that the caller passes. That is what makes
    ZeRO-3 right: it sees an access outside the owner and from then on gathers the weight for this module too, in
    forward and backward. A second registration of the parameter would not survive `to_empty`.
    """

    def forward(
        self, x_BTD: Tensor, embedding: nn.Module, use: HeadUse = project, bias_V: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V), or what `use` makes of hidden states, weight and bias."""
        weight_VD = embedding.weight
        assert isinstance(weight_VD, Tensor), "the embedding of a tied head owns a weight"
        return use(x_BTD, weight_VD, bias_V)


class OutputBias(nn.Module):
    """A bias of each token's logit, which the product with the head's weight adds."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(rows))

    def forward(self, x_BTD: Tensor, head: Head, **use: HeadUse) -> Tensor:
        """What the head makes of hidden states, with the bias."""
        y: Tensor = head(x_BTD, bias_V=self.bias, **use)
        return y


class TokenLoss(nn.Module):
    """Cross entropy of each token from hidden states, in float32; padded vocabulary columns take no part."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.kernels = REFERENCE
        self.linear = False
        """Never hold all logits."""

    def use_kernels(self, kernels: Kernels) -> None:
        """Call these kernels from now on."""
        self.kernels = kernels

    def forward(self, x_BTD: Tensor, labels_BT: Tensor, head: Head) -> Tensor:
        """Losses (B, T), float32, nats; every label must lie in [0, vocab_size)."""
        if self.linear:
            return head(x_BTD, use=partial(self.of_hidden_states, labels_BT))
        return self.of_logits(head(x_BTD), labels_BT)

    def of_logits(self, logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
        """Losses (B, T) of logits."""
        return self.kernels.cross_entropy(logits_BTV, labels_BT, self.vocab_size)

    def divergence(self, logits_BTV: Tensor, teacher_BTV: Tensor, temperature: float, top_k: int | None) -> Tensor:
        """How far the distribution of logits is from a teacher's at each position (B, T), as `forward_kl`."""
        return forward_kl(logits_BTV, teacher_BTV, self.vocab_size, temperature, top_k)

    def of_hidden_states(
        self, labels_BT: Tensor, x_BTD: Tensor, weight_VD: Tensor, bias_V: Tensor | None = None
    ) -> Tensor:
        """Losses (B, T) of the logits x weight^T + bias, a part of which exists at a time."""
        x_ND, labels_N = x_BTD.flatten(0, 1), labels_BT.flatten()
        losses_N = self.kernels.linear_cross_entropy(x_ND, weight_VD, labels_N, self.vocab_size, bias_V=bias_V)
        return losses_N.view(labels_BT.shape)


def use_linear_loss(model: nn.Module) -> None:
    """Let every `TokenLoss` of `model` never hold all logits."""
    for module in model.modules():
        if isinstance(module, TokenLoss):
            module.linear = True


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
