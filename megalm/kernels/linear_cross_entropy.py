"""Cross entropy of a linear output head that never holds all logits: the vocabulary goes by in chunks.

Shapes: N tokens, D model width, V padded vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megalm.kernels.cross_entropy import (
    fused_vocabulary_gradient_,
    fused_vocabulary_statistics,
    vocabulary_gradient,
    vocabulary_statistics,
)

DEFAULT_CHUNK = 8192
"""Columns of logits that exist at one time."""


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    num_classes: int | None = None,
    *,
    z_loss: float = 0.0,
    chunk: int = DEFAULT_CHUNK,
    fused: bool = False,
) -> Tensor:
    """-log softmax(x weight^T)[label] of every token, float32 (N,), plus z_loss x logsumexp^2.

    Needs N x chunk logits of memory instead of N x V, and computes the logits once more in the backward. Each
    chunk's logits are rounded to the dtype of x, as a linear layer would. Rows of `weight_VD` from `num_classes` on
    are padding. Sources: Wijmans et al. 2024, "Cut your losses", arXiv:2411.09009; Liger-Kernel, arXiv:2410.10989.
    """
    classes = len(weight_VD) if num_classes is None else num_classes
    if labels_N.numel() and not (int(labels_N.min()) >= 0 and int(labels_N.max()) < classes):
        raise RuntimeError(f"labels must lie in [0, {classes})")
    apply: Callable[..., Tensor] = _LinearCrossEntropy.apply
    return apply(x_ND, weight_VD, labels_N, classes, z_loss, chunk, fused)


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward: statistics chunk by chunk, merged. Backward: each chunk's logits again, then both products."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        classes: int,
        z_loss: float,
        chunk: int,
        fused: bool,
    ) -> Tensor:
        statistics = fused_vocabulary_statistics if fused else vocabulary_statistics
        largest_N = x_ND.new_full((len(x_ND),), float("-inf"), dtype=torch.float32)
        sum_N, target_N = torch.zeros_like(largest_N), torch.zeros_like(largest_N)
        for start in range(0, classes, chunk):
            stop = min(start + chunk, classes)
            high_N, part_N, label_N = statistics(x_ND @ weight_VD[start:stop].t(), labels_N, start, stop - start)
            merged_N = torch.maximum(largest_N, high_N)
            sum_N = sum_N * (largest_N - merged_N).exp() + part_N * (high_N - merged_N).exp()
            largest_N, target_N = merged_N, target_N + label_N
        logsumexp_N = largest_N + sum_N.log()
        ctx.save_for_backward(x_ND, weight_VD, labels_N, logsumexp_N)
        ctx.options = (classes, z_loss, chunk, fused)
        return logsumexp_N - target_N + z_loss * logsumexp_N.square()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_VD, labels_N, logsumexp_N = ctx.saved_tensors
        classes, z_loss, chunk, fused = ctx.options
        gradient = fused_vocabulary_gradient_ if fused else vocabulary_gradient
        scale_N = grads[0].contiguous()
        # sums over chunks stay in float32; a row of the weight belongs to one chunk
        grad_x_ND = torch.zeros(x_ND.shape, dtype=torch.float32, device=x_ND.device)
        grad_weight_VD = torch.empty_like(weight_VD)
        grad_weight_VD[classes:] = 0
        for start in range(0, classes, chunk):
            stop = min(start + chunk, classes)
            part_VD = weight_VD[start:stop]
            logits_NV = x_ND @ part_VD.t()
            grad_NV = gradient(logits_NV, labels_N, logsumexp_N, scale_N, start, stop - start, z_loss)
            grad_x_ND += grad_NV @ part_VD
            torch.mm(grad_NV.t(), x_ND, out=grad_weight_VD[start:stop])
        return grad_x_ND.to(x_ND.dtype), grad_weight_VD, None, None, None, None, None
