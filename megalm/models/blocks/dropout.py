"""Dropout of the residual stream and of its branches. Shapes: B batch, T sequence, D model width."""

from torch import Tensor, nn

from megalm.kernels.backend import REFERENCE, Kernels
from megalm.kernels.dropout import WHOLE


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
