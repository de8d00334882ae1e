"""Per-token cross entropy in float32 that keeps no float32 copy of the logits.

Shapes: N tokens, V padded vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Rows are taken in groups of about this many logits, so that the float32 work space stays at 16 MiB.
CHUNK_ELEMENTS = 4 * 1024 * 1024


def cross_entropy(logits: Tensor, labels: Tensor, num_classes: int | None = None) -> Tensor:
    """-log softmax(logits)[label] of every token, float32, shape of `labels`.

    `logits` (..., V) is any float dtype, `labels` (...) integers in [0, num_classes). Every token counts: there is no
    ignored label, so positions without a target need a valid label and a mask on the result. Columns from
    `num_classes` (default V) on are vocabulary padding: no probability, gradient exactly zero.

    Saved for backward: the logits as they are (no float32 copy, no softmax) and the labels. The gradient has the
    dtype of the logits and is computed in float32, a group of rows at a time.
    """
    classes = logits.shape[-1] if num_classes is None else num_classes
    apply: Callable[[Tensor, Tensor, int], Tensor] = _CrossEntropy.apply
    return apply(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), classes).view(labels.shape)


class _CrossEntropy(torch.autograd.Function):
    """Forward: per-row loss. Backward: (softmax - one hot) x incoming gradient, recomputed from the logits."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, num_classes: int) -> Tensor:
        ctx.save_for_backward(logits_NV, labels_N)
        ctx.num_classes = num_classes
        losses = [
            -torch.log_softmax(rows[:, :num_classes], dim=-1, dtype=torch.float32).gather(1, label[:, None]).squeeze(1)
            for rows, label in zip(_chunks(logits_NV, logits_NV), _chunks(labels_N, logits_NV), strict=True)
        ]
        return losses[0] if len(losses) == 1 else torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, labels_N = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV)
        grad_NV[:, ctx.num_classes :] = 0
        groups = (_chunks(tensor, logits_NV) for tensor in (grad_NV, logits_NV, labels_N, grad_outputs[0]))
        for grad, rows, label, scale in zip(*groups, strict=True):
            softmax = torch.softmax(rows[:, : ctx.num_classes], dim=-1, dtype=torch.float32)
            softmax.scatter_add_(1, label[:, None], softmax.new_full((1, 1), -1.0).expand(len(label), 1))
            grad[:, : ctx.num_classes] = softmax.mul_(scale[:, None])
        return grad_NV, None, None


def _chunks(tensor: Tensor, logits_NV: Tensor) -> tuple[Tensor, ...]:
    """Views of `tensor` in groups of rows; one group under torch.compile, which fuses the work space away."""
    if torch.compiler.is_compiling():
        return (tensor,)
    return torch.split(tensor, max(1, CHUNK_ELEMENTS // logits_NV.shape[-1]))
