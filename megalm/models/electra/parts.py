"""What ELECTRA's two networks have beside embeddings and layers.

Shapes: B batch, T sequence, D model width, E embedding width, V padded vocabulary.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.kernels.backend import REFERENCE, Kernels
from megalm.models.bert.parts import TokenTransform, activation_of
from megalm.models.blocks.head import Head, OutputBias, OutputHead, TiedHead, TokenLoss, project
from megalm.models.blocks.norm import build_norm
from megalm.models.blocks.sampling import TokenSampler


def projection(config: ModelConfig) -> nn.Module:
    """From the width of embeddings to that of the network, where they differ."""
    width, inner = config.embedding_width, config.hidden_size
    return nn.Identity() if width == inner else nn.Linear(width, inner)


def final_norm(config: ModelConfig) -> nn.Module:
    """The norm after the last layer, where that does not end with one."""
    return nn.Identity() if config.norm_order == "post" else build_norm(config, config.hidden_size)


@dataclass(frozen=True)
class Draw:
    """Where tokens are drawn: rows, places in them, seeds of the rows' samples; int64 [N] each."""

    rows: Tensor
    places: Tensor
    seeds: Tensor


class GeneratorEnds(nn.Module):
    """The generator without embeddings and layers: how it begins, and what makes tokens of its hidden states."""

    def __init__(self, config: ModelConfig, vocab_size: int, rows: int) -> None:
        super().__init__()
        self.is_tied = config.tied
        self.projection = projection(config)
        self.final_norm = final_norm(config)
        self.lm_head = TokenTransform(config)
        self.head = TiedHead() if config.tied else OutputHead(config.embedding_width, rows)
        self.head_bias = OutputBias(rows)
        self.token_loss = TokenLoss(vocab_size)
        self.sampler = TokenSampler(vocab_size)

    def forward(self, x_BTD: Tensor, tokens: nn.Module, labels_BT: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Losses (B, T) of `labels_BT`, and the ids [N] that are drawn; a tied head multiplies by the table `tokens`.

        A loss that never holds all logits leaves those of the places of `draw` to be made for it.
        """
        head: Head = partial(self.head, embedding=tokens) if self.is_tied else self.head
        read_BTE = self.lm_head(self.final_norm(x_BTD))
        drawn: list[Tensor] = []

        def losses_of(x_BTE: Tensor, weight_VE: Tensor, bias_V: Tensor | None) -> Tensor:
            with torch.no_grad():
                logits_NV = project(x_BTE[draw.rows, draw.places], weight_VE, bias_V)
            drawn.append(self.sampler(logits_NV, draw.seeds, draw.places))
            return self.token_loss.of_hidden_states(labels_BT, x_BTE, weight_VE, bias_V)

        if self.token_loss.linear:
            losses_BT: Tensor = self.head_bias(read_BTE, head=head, use=losses_of)
            return losses_BT, drawn[0]
        logits_BTV = self.head_bias(read_BTE, head=head)
        logits_NV = logits_BTV.detach()[draw.rows, draw.places]
        return self.token_loss.of_logits(logits_BTV, labels_BT), self.sampler(logits_NV, draw.seeds, draw.places)


class Detector(nn.Module):
    """Whether a token is replaced, from its hidden state.

    Source: google-research/electra, run_pretraining.py, `_get_discriminator_output`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self._activation = config.activation
        self.use_kernels(REFERENCE)

    def use_kernels(self, kernels: Kernels) -> None:
        """Take the activation from `kernels`."""
        self.function = activation_of(self._activation, kernels)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Scores (B, T, 1)."""
        scores_BT1: Tensor = self.classifier(self.function(self.dense(x_BTD)))
        return scores_BT1
