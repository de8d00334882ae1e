"""Per-token cross entropy in float32 that keeps no float32 copy of the logits.

Shapes: N tokens, V padded vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megalm.kernels.self_test import Check, Numbers, with_gradient
from megalm.kernels.support import changed, fused_takes

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


def vocabulary_statistics(
    logits_NV: Tensor, labels_N: Tensor, start: int, num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(max, sum of exp(logit - max), logit of the label) of each row over one range of the vocabulary, float32.

    Column j is token `start` + j; columns from `num_classes` on are padding. The label's logit is 0 where the label
    lies outside of the range: its sum over ranges is the label's logit. With no columns the maximum is -inf.
    """
    groups = zip(_chunks(logits_NV, logits_NV), _chunks(labels_N, logits_NV), strict=True)
    parts = [_statistics(rows[:, :num_classes].float(), labels - start) for rows, labels in groups]
    largest_N, sum_N, target_N = (torch.cat(column) for column in zip(*parts, strict=True))
    return largest_N, sum_N, target_N


def _statistics(wide_NV: Tensor, column_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, classes = wide_NV.shape
    if classes == 0:
        return wide_NV.new_full((rows,), float("-inf")), wide_NV.new_zeros(rows), wide_NV.new_zeros(rows)
    largest_N = wide_NV.amax(-1)
    here_N = (column_N >= 0) & (column_N < classes)
    target_N = wide_NV.gather(1, column_N.clamp(0, classes - 1)[:, None]).squeeze(1)
    return largest_N, (wide_NV - largest_N[:, None]).exp_().sum(-1), torch.where(here_N, target_N, 0.0)


def vocabulary_gradient(
    logits_NV: Tensor,
    labels_N: Tensor,
    logsumexp_N: Tensor,
    scale_N: Tensor,
    start: int,
    num_classes: int,
) -> Tensor:
    """scale x (softmax - one hot) of one range of the vocabulary; dtype of the logits.

    `logsumexp_N` is over the whole vocabulary. Padding columns get zero.
    """
    grad_NV = torch.empty_like(logits_NV)
    grad_NV[:, num_classes:] = 0
    tensors = (grad_NV, logits_NV, labels_N - start, logsumexp_N, scale_N)
    for grad, rows, column, logsumexp, scale in zip(*(_chunks(tensor, logits_NV) for tensor in tensors), strict=True):
        wide = (rows[:, :num_classes].float() - logsumexp[:, None]).exp_()
        wide *= scale[:, None]
        if num_classes:
            here = (column >= 0) & (column < num_classes)
            one_hot = torch.where(here, -scale, 0.0)[:, None]
            wide.scatter_add_(1, column.clamp(0, num_classes - 1)[:, None], one_hot)
        grad[:, :num_classes] = wide.masked_fill_(scale[:, None] == 0, 0.0)
    return grad_NV


def fused_vocabulary_statistics(
    logits_NV: Tensor, labels_N: Tensor, start: int, num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`vocabulary_statistics` in one pass over the logits."""
    if not fused_takes(logits_NV):
        return vocabulary_statistics(logits_NV, labels_N, start, num_classes)
    largest, total, target = torch.ops.megalm.cross_entropy(logits_NV, labels_N, start, num_classes, False)
    return largest, total, target


def fused_vocabulary_gradient_(
    logits_NV: Tensor,
    labels_N: Tensor,
    logsumexp_N: Tensor,
    scale_N: Tensor,
    start: int,
    num_classes: int,
) -> Tensor:
    """`vocabulary_gradient` written over the logits, which it returns."""
    if not fused_takes(logits_NV):
        return vocabulary_gradient(logits_NV, labels_N, logsumexp_N, scale_N, start, num_classes)
    torch.ops.megalm.cross_entropy_backward_(logits_NV, labels_N, logsumexp_N, scale_N, start, num_classes)
    changed(logits_NV)
    return logits_NV


def fused_cross_entropy(
    logits: Tensor, labels: Tensor, num_classes: int | None = None, *, in_place: bool = False
) -> Tensor:
    """`cross_entropy` in one pass over the logits.

    With `in_place` the backward writes the gradient over the logits: nobody may read them afterwards, and the graph
    can be walked once only (a second backward is an error). A label outside of the vocabulary is an error.
    """
    classes = logits.shape[-1] if num_classes is None else num_classes
    if not fused_takes(logits):
        return cross_entropy(logits, labels, classes)
    flat, ids = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    if in_place and not torch.compiler.is_compiling():
        in_place_apply: Callable[..., Tensor] = _InPlaceCrossEntropy.apply
        losses = in_place_apply(flat, ids, classes)
    else:
        largest, total, target = torch.ops.megalm.cross_entropy(flat.detach(), ids, 0, classes, True)
        apply: Callable[..., Tensor] = _CrossEntropyOfStatistics.apply
        losses = apply(flat, ids, largest + total.log(), target, classes)
    return losses.view(labels.shape)


class _CrossEntropyOfStatistics(torch.autograd.Function):
    """Forward: per-row loss from the row's statistics. Backward: a new tensor, from the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, labels_N: Tensor, logsumexp_N: Tensor, target_N: Tensor, classes: int
    ) -> Tensor:
        ctx.save_for_backward(logits_NV, labels_N, logsumexp_N)
        ctx.classes = classes
        return logsumexp_N - target_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits_NV, labels_N, logsumexp_N = ctx.saved_tensors
        scale_N = grads[0].contiguous()
        arguments = (logits_NV, labels_N, logsumexp_N, scale_N, 0, ctx.classes)
        grad_NV: Tensor = torch.ops.megalm.cross_entropy_backward(*arguments)
        return grad_NV, None, None, None, None


class _InPlaceCrossEntropy(torch.autograd.Function):
    """Forward: per-row loss. Backward: the gradient over the logits themselves."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, classes: int) -> Tensor:
        largest_N, sum_N, target_N = torch.ops.megalm.cross_entropy(logits_NV, labels_N, 0, classes, True)
        logsumexp_N = largest_N + sum_N.log()
        ctx.save_for_backward(logits_NV, labels_N, logsumexp_N)
        ctx.classes = classes
        losses_N: Tensor = logsumexp_N - target_N
        return losses_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits_NV, labels_N, logsumexp_N = ctx.saved_tensors
        scale_N = grads[0].contiguous()
        grad_NV = fused_vocabulary_gradient_(logits_NV, labels_N, logsumexp_N, scale_N, 0, ctx.classes)
        return grad_NV, None, None


def register() -> None:
    """Fake implementations."""
    torch.library.register_fake("megalm::cross_entropy", _fake)
    torch.library.register_fake("megalm::cross_entropy_backward", lambda logits, *_: logits.new_empty(logits.shape))
    torch.library.register_fake("megalm::cross_entropy_backward_", lambda *_: None)


def _fake(logits: Tensor, labels: Tensor, start: int, num_classes: int, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    largest, total, target = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    return largest, total, target


def check_cross_entropy(numbers: Numbers, cols: int) -> tuple[Tensor, Tensor]:
    """With padded columns, and its gradient."""
    x, labels = 3 * numbers(4, 40 + cols), torch.tensor([0, 3, 70, 9])
    return (
        with_gradient(lambda x: fused_cross_entropy(x, labels, 34 + cols), x),
        with_gradient(lambda x: cross_entropy(x, labels, 34 + cols), x),
    )


CHECKS: tuple[Check, ...] = (check_cross_entropy,)
