"""The position-wise feed-forward network. Shapes: B batch, T sequence, D model width, F feed-forward width."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.kernels.backend import REFERENCE, Kernels
from megalm.models.blocks.dropout import Dropout


class MLP(nn.Module):
    """w_down(dropout(activation(w_up(x)))) with GELU, its tanh approximation, ReLU or squared ReLU."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.w_up = nn.Linear(config.hidden_size, config.ffn_size, bias=config.linear_bias)
        self.w_down = nn.Linear(config.ffn_size, config.hidden_size, bias=config.linear_bias)
        self.dropout = Dropout(dropout)
        self._activation = config.activation
        self.use_kernels(REFERENCE)

    def use_kernels(self, kernels: Kernels) -> None:
        """Take the activation from `kernels`; ReLU is torch's own."""
        self.activation = F.relu if self._activation == "relu" else getattr(kernels, self._activation)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The branch's output (B, T, D)."""
        y_BTD: Tensor = self.w_down(self.dropout(self.activation(self.w_up(x_BTD))))
        return y_BTD


class GatedMLP(nn.Module):
    """w_down(dropout(activation(w_gate(x)) * w_up(x))) with SiLU, GELU or its tanh approximation.

    Source: Shazeer 2020, arXiv:2002.05202.
    """

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.w_gate = nn.Linear(config.hidden_size, config.ffn_size, bias=config.linear_bias)
        self.w_up = nn.Linear(config.hidden_size, config.ffn_size, bias=config.linear_bias)
        self.w_down = nn.Linear(config.ffn_size, config.hidden_size, bias=config.linear_bias)
        self.dropout = Dropout(dropout)
        self._activation = config.activation
        self.use_kernels(REFERENCE)

    def use_kernels(self, kernels: Kernels) -> None:
        """Take the activation from `kernels`."""
        if self._activation == "silu":
            self.activation = kernels.swiglu
        else:
            self.activation = _gated(getattr(kernels, self._activation))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The branch's output (B, T, D)."""
        y_BTD: Tensor = self.w_down(self.dropout(self.activation(self.w_gate(x_BTD), self.w_up(x_BTD))))
        return y_BTD


def build_mlp(config: ModelConfig, dropout: float = 0.0) -> nn.Module:
    """The feed-forward network that the configuration names, with `dropout` of its inner channels."""
    return GatedMLP(config, dropout) if config.gated else MLP(config, dropout)


def _gated(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda gate, up: activation(gate) * up
