"""Models that give each position a distribution over the vocabulary: head, loss, and learning from a teacher.

Shapes: B micro-batch, T sequence, D model width, V padded vocabulary, as a tensor-parallel rank has it.
"""

from abc import abstractmethod
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from megalm.kernels.backend import REFERENCE
from megalm.models.blocks.head import FullLogits, Head, TokenLoss
from megalm.models.blocks.loss import weighted_losses
from megalm.models.contract import Batch, LanguageModel, Losses, Stream


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A teacher, and how a student learns from its distributions."""

    teacher: "TokenModel"
    """Whole (no pipeline stage), on the student's device and cut as the student is. It is frozen: no part of the
    student's parameters, without dropout and without gradients."""
    temperature: float
    top_k: int | None
    weight: float
    """Of the loss "kd"."""
    skip_lm_loss: bool
    """The student's own losses weigh nothing."""

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """The teacher's logits (B, T, V)."""
        teacher = self.teacher
        return teacher.head_logits(teacher.run_layers(teacher.embed(batch), batch))


class TokenModel(LanguageModel):
    """A model whose head makes logits of hidden states at each position, and whose loss "lm" is of these.

    With a teacher there is "kd" too: the forward Kullback-Leibler divergence of the student from it, at the same
    positions, with the same weights (see `kernels.divergence`).
    """

    token_loss: TokenLoss
    full_logits: FullLogits
    distillation: Distillation | None = None

    @abstractmethod
    def read_by_head(self, stream: Stream) -> Tensor:
        """The hidden states (B, T, D) that the head reads, from the last layer's stream."""

    @abstractmethod
    def _head(self) -> Head:
        """The head, with its weights."""

    def learn_from(self, distillation: Distillation) -> None:
        """From now on there is the loss "kd"."""
        self.distillation = distillation
        own = dict.fromkeys(self.loss_weights, 0.0) if distillation.skip_lm_loss else self.loss_weights
        self.loss_weights = MappingProxyType({**own, "kd": distillation.weight})
        # the fused ones write the loss's gradient over the logits, which the divergence reads too
        self.token_loss.use_kernels(REFERENCE)

    def head_logits(self, stream: Stream) -> Tensor:
        """Logits (B, T, V) as the head gives them, with columns of padding, from the last layer's stream."""
        logits_BTV: Tensor = self._head()(self.read_by_head(stream))
        return logits_BTV

    def logits(self, stream: Stream) -> Tensor:
        """Logits (B, T, V) of the whole vocabulary; padded columns are -inf."""
        logits_BTV: Tensor = self.full_logits(self.head_logits(stream))
        return logits_BTV

    def token_losses(self, x_BTD: Tensor, batch: Batch) -> Losses:
        """The weighted losses of all tokens (B, T), float32, nats, from what the head reads."""
        found, kd = {}, self.distillation
        if kd is None:
            losses_BT = self.token_loss(x_BTD, batch["labels"], self._head())
        else:
            teacher_BTV, logits_BTV = kd.logits(batch), self._head()(x_BTD)
            losses_BT = self.token_loss.of_logits(logits_BTV, batch["labels"])
            kd_BT = self.token_loss.divergence(logits_BTV, teacher_BTV, kd.temperature, kd.top_k)
            found["kd"] = weighted_losses(kd_BT, batch["loss_mask"])
        return {"lm": weighted_losses(losses_BT, batch["loss_mask"]), **found}

    def token_counts(self, batch: Batch) -> Losses:
        """The weight of each token (B, T)."""
        return dict.fromkeys(("lm",) if self.distillation is None else ("lm", "kd"), batch["loss_mask"])
