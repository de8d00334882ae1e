"""Linear layers of which each rank holds a part of the weight.

Shapes: B batch, T sequence, D input width, F output width, all of them a rank's own.
Source: Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053, section 3.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.distributed.functional import Regathered, after_comm, regathered
from megalm.parallel.region import TensorParallel


class ColumnParallelLinear(nn.Linear):
    """A linear layer inside the region whose output channels are spread: y_rank = x W_rank^T + b_rank.

    Several of them share one input, which enters the region once, for all (`region.InputHook`). The gradients of their
    weights are computed while that of the input is summed over the ranks. Under sequence parallelism a rank keeps its
    own part of the input; the whole is gathered again in the backward pass, once for all, while the gradient of the
    input is computed (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2).
    """

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The layer's output (B, T, F)."""
        return linear_with_async_grad_comm(x_BTD, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """A linear layer whose input channels are spread: y = sum over ranks of x_rank W_rank^T, + b; leaves the region.

    The bias is whole on every rank and is added once, to the sum.
    """

    def __init__(self, tp: TensorParallel, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias)
        self.weight, self.bias = linear.weight, linear.bias
        self.tp = tp

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The layer's output (B, T, F) as it stands outside the region."""
        y_BTF = self.tp.from_region(F.linear(x_BTD, self.weight))
        return y_BTF if self.bias is None else y_BTF + self.bias


def linear_with_async_grad_comm(x_BTD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """x W^T + b whose input gradient and weight gradient are two autograd nodes, the second `after_comm` for x.

    A backward pass that wants one of the two, as zero-bubble schedules do, computes no more than that. An `x` that was
    gathered is not kept but gathered again for the weight gradient, which its all-gather precedes by a node of its own.
    """
    if not (torch.is_grad_enabled() and x_BTD.requires_grad and weight_FD.requires_grad):
        return F.linear(x_BTD, weight_FD, bias_F)
    weight_gradient: Callable[[Tensor, Tensor, Tensor | None, Regathered | None], Tensor] = _WeightGradient.apply
    product: Callable[[Tensor, _Constants], Tensor] = _InputGradient.apply
    join: Callable[[Tensor, Tensor], Tensor] = _Join.apply
    source = regathered(x_BTD)
    token_BTF = weight_gradient(x_BTD.detach(), weight_FD, bias_F, source)
    after_comm(token_BTF.grad_fn, x_BTD)
    y_BTF = product(x_BTD, (weight_FD, bias_F))
    # made after `product`, so that in the backward pass the all-gather begins before its work
    return join(y_BTF, token_BTF if source is None else source.begin_before(token_BTF))


_Constants = tuple[Tensor, Tensor | None]


class _WeightGradient(torch.autograd.Function):
    """Forward: nothing but the output's shape, without memory. Backward: gradients of weight and bias.

    Saved: x, or nothing where it comes again from a `source`.
    """

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, weight_FD: Tensor, bias_F: Tensor | None, source: Regathered | None) -> Tensor:
        if source is None:
            ctx.save_for_backward(x_BTD)
        ctx.has_bias, ctx.source = bias_F is not None, source
        return x_BTD.new_zeros(()).expand(*x_BTD.shape[:-1], weight_FD.shape[0])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor, Tensor | None, None]:
        x_BTD = ctx.saved_tensors[0] if ctx.source is None else ctx.source.take()
        grad_NF = grad_outputs[0].flatten(0, -2)
        return None, grad_NF.t() @ x_BTD.flatten(0, -2), grad_NF.sum(0) if ctx.has_bias else None, None


class _InputGradient(torch.autograd.Function):
    """Forward: x W^T + b. Backward: gradient of x; weight and bias are constants.

    They come in a tuple, so that autograd makes no edge to them, and the weight is read again in the backward pass,
    when ZeRO stage 3 has gathered it anew.
    """

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, constants: _Constants) -> Tensor:
        ctx.weight_FD = constants[0]
        return F.linear(x_BTD, *constants)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0] @ ctx.weight_FD.detach(), None


class _Join(torch.autograd.Function):
    """Forward: the first argument. Backward: the gradient to both."""

    @staticmethod
    def forward(ctx: Any, y_BTF: Tensor, token_BTF: Tensor) -> Tensor:
        return y_BTF.view_as(y_BTF)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        return grad_outputs[0], grad_outputs[0]
