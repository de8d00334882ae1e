"""Normalization of the last dim: LayerNorm and RMSNorm."""

import torch
from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.kernels.backend import REFERENCE, Kernels


class LayerNorm(nn.Module):
    """Layer normalization of the last dim, with or without a bias; with `offset` 1.0 the weight is stored as its
    distance from one.

    `module(x)` is the normalized x, same shape and dtype; `module(x, residual)` is that of the sum, and the sum.
    """

    def __init__(self, size: int, epsilon: float, offset: float = 0.0, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.epsilon = epsilon
        self.offset = offset
        self.kernels = REFERENCE

    def use_kernels(self, kernels: Kernels) -> None:
        """Call these kernels from now on."""
        self.kernels = kernels

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalized x, or (normalized x + residual, x + residual)."""
        if residual is None:
            return self.kernels.layer_norm(x, self._scale(), self._shift(), self.epsilon)
        return self.kernels.layer_norm_after_add(x, residual, self._scale(), self._shift(), self.epsilon)

    def of_sum(self, total: Tensor) -> tuple[Tensor, Tensor]:
        """(normalized `total`, `total`): as `forward` of two terms with this sum, gradients equal to the bit."""
        return self.kernels.layer_norm_after_add(total, None, self._scale(), self._shift(), self.epsilon)

    def _scale(self) -> Tensor:
        return _with_offset(self.weight, self.offset)

    def _shift(self) -> Tensor:
        return torch.zeros_like(self.weight) if self.bias is None else self.bias


class RMSNorm(nn.Module):
    """Root-mean-square normalization of the last dim; called as `LayerNorm` is."""

    def __init__(self, size: int, epsilon: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.epsilon = epsilon
        self.offset = offset
        self.kernels = REFERENCE

    def use_kernels(self, kernels: Kernels) -> None:
        """Call these kernels from now on."""
        self.kernels = kernels

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalized x, or (normalized x + residual, x + residual)."""
        if residual is None:
            return self.kernels.rms_norm(x, self._scale(), self.epsilon)
        return self.kernels.rms_norm_after_add(x, residual, self._scale(), self.epsilon)

    def of_sum(self, total: Tensor) -> tuple[Tensor, Tensor]:
        """(normalized `total`, `total`): as `forward` of two terms with this sum, gradients equal to the bit."""
        return self.kernels.rms_norm_after_add(total, None, self._scale(), self.epsilon)

    def _scale(self) -> Tensor:
        return _with_offset(self.weight, self.offset)


class FullWidthRMSNorm(RMSNorm):
    """The norm of all heads of a projection together, before it is cut into heads."""


def build_norm(config: ModelConfig, size: int) -> nn.Module:
    """The normalization that the configuration names, for a last dim of `size`."""
    offset = 1.0 if config.apply_layernorm_1p else 0.0
    if config.normalization == "RMSNorm":
        return RMSNorm(size, config.norm_epsilon, offset)
    return LayerNorm(size, config.norm_epsilon, offset, bias=not config.disable_bias_norm)


def build_qk_norm(config: ModelConfig, heads: int) -> nn.Module:
    """The normalization of queries or keys of so many heads, if the configuration has one."""
    if not config.qk_layernorm:
        return nn.Identity()
    if not config.qk_layernorm_full_width:
        return build_norm(config, config.head_dim)
    return FullWidthRMSNorm(heads * config.head_dim, config.norm_epsilon, 1.0 if config.apply_layernorm_1p else 0.0)


def _with_offset(weight: Tensor, offset: float) -> Tensor:
    # 1 + w is rounded to float32, not to bfloat16, which could not tell 1 + 2^-9 from 1.
    return weight.float() + offset if offset else weight
