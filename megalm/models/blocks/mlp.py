"""The position-wise feed-forward network. Shapes: B batch, T sequence, D model width, F feed-forward width."""

from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.kernels.backend import REFERENCE, Kernels


class MLP(nn.Module):
    """w_down(activation(w_up(x))) with GELU, GELU tanh or squared ReLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w_up = nn.Linear(config.hidden_size, config.ffn_size, bias=config.linear_bias)
        self.w_down = nn.Linear(config.ffn_size, config.hidden_size, bias=config.linear_bias)
        self._activation = "squared_relu" if config.squared_relu else "gelu_tanh" if config.openai_gelu else "gelu"
        self.use_kernels(REFERENCE)

    def use_kernels(self, kernels: Kernels) -> None:
        """Take the activation from `kernels`."""
        self.activation = getattr(kernels, self._activation)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The branch's output (B, T, D)."""
        y_BTD: Tensor = self.w_down(self.activation(self.w_up(x_BTD)))
        return y_BTD


class GatedMLP(nn.Module):
    """w_down(silu(w_gate(x)) * w_up(x)). Source: Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w_gate = nn.Linear(config.hidden_size, config.ffn_size, bias=config.linear_bias)
        self.w_up = nn.Linear(config.hidden_size, config.ffn_size, bias=config.linear_bias)
        self.w_down = nn.Linear(config.ffn_size, config.hidden_size, bias=config.linear_bias)
        self.use_kernels(REFERENCE)

    def use_kernels(self, kernels: Kernels) -> None:
        """Take the activation from `kernels`."""
        self.activation = kernels.swiglu

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The branch's output (B, T, D)."""
        y_BTD: Tensor = self.w_down(self.activation(self.w_gate(x_BTD), self.w_up(x_BTD)))
        return y_BTD


def build_mlp(config: ModelConfig) -> nn.Module:
    """The feed-forward network that the configuration names."""
    return GatedMLP(config) if config.swiglu else MLP(config)
