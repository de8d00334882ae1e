"""Cross entropy of a linear output head that never holds all logits: they go by in chunks.

Two ways, for what is known in the forward. Of single losses, whose gradients come later, the vocabulary goes by, twice.
Of a weighted sum of losses the gradients follow at once: the tokens go by, once, and no product is computed again.

Shapes: N tokens, M tokens of a chunk, D model width, V padded vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.kernels.cross_entropy import (
    fused_vocabulary_gradient_,
    fused_vocabulary_statistics,
    vocabulary_gradient,
    vocabulary_statistics,
)

DEFAULT_CHUNK = 8192
"""Columns of logits of all tokens that exist at one time, or as many logits of whole rows."""
_LEAST_ROWS = 256
"""Tokens of a chunk of whole rows: with fewer, adding up the weight's gradient costs more than the products."""


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    num_classes: int | None = None,
    *,
    chunk: int = DEFAULT_CHUNK,
    fused: bool = False,
) -> Tensor:
    """-log softmax(x weight^T)[label] of every token, float32 (N,).

    Needs N x chunk logits of memory instead of N x V, and computes the logits once more in the backward. Each
    chunk's logits are rounded to the dtype of x, as a linear layer would. Rows of `weight_VD` from `num_classes` on
    are padding. Sources: Wijmans et al. 2024, "Cut your losses", arXiv:2411.09009; Liger-Kernel, arXiv:2410.10989.
    """
    classes = _classes(weight_VD, labels_N, num_classes)
    apply: Callable[..., Tensor] = _LinearCrossEntropy.apply
    return apply(x_ND, weight_VD, labels_N, classes, chunk, fused)


def summed_linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    token_weights_N: Tensor,
    num_classes: int | None = None,
    *,
    chunk: int = DEFAULT_CHUNK,
    fused: bool = False,
) -> Tensor:
    """Sum of token_weights x `linear_cross_entropy`, float32 scalar; 1 / N in every place makes it the mean.

    Where gradients are on, those of `x_ND` and `weight_VD` are computed with the loss: three products instead of
    four. They wait for the backward. The token weights get no gradient.
    Source: Hsu et al. 2024, Liger-Kernel, arXiv:2410.10989.

    Raises:
        RuntimeError: there is not one token weight for each label.
    """
    classes = _classes(weight_VD, labels_N, num_classes)
    if token_weights_N.shape != labels_N.shape:
        raise RuntimeError(
            f"token weights {tuple(token_weights_N.shape)} must be one for each of {len(labels_N)} labels"
        )
    weights_N = token_weights_N.detach().to(torch.float32).contiguous()
    wanted = tuple(torch.is_grad_enabled() and t.requires_grad for t in (x_ND, weight_VD))
    apply: Callable[..., Tensor] = _SummedLinearCrossEntropy.apply
    return apply(x_ND, weight_VD, labels_N, weights_N, wanted, classes, chunk, fused)


def _classes(weight_VD: Tensor, labels_N: Tensor, num_classes: int | None) -> int:
    """Number of tokens that count; the labels are among them.

    Raises:
        RuntimeError: a label is not.
    """
    classes = len(weight_VD) if num_classes is None else num_classes
    if labels_N.numel() and not (int(labels_N.min()) >= 0 and int(labels_N.max()) < classes):
        raise RuntimeError(f"labels must lie in [0, {classes})")
    return classes


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward: statistics chunk by chunk, merged. Backward: each chunk's logits again, then both products."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        classes: int,
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
        ctx.options = (classes, chunk, fused)
        return logsumexp_N - target_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_VD, labels_N, logsumexp_N = ctx.saved_tensors
        classes, chunk, fused = ctx.options
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
            grad_NV = gradient(logits_NV, labels_N, logsumexp_N, scale_N, start, stop - start)
            grad_x_ND += grad_NV @ part_VD
            torch.mm(grad_NV.t(), x_ND, out=grad_weight_VD[start:stop])
        return grad_x_ND.to(x_ND.dtype), grad_weight_VD, None, None, None, None


class _SummedLinearCrossEntropy(torch.autograd.Function):
    """Forward: loss and gradients of some tokens after the others. Backward: the gradients, scaled.

    The gradients are those for token weights of 1 at most, so that float16 can hold them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        token_weights_N: Tensor,
        wanted: tuple[bool, bool],
        classes: int,
        chunk: int,
        fused: bool,
    ) -> Tensor:
        statistics = fused_vocabulary_statistics if fused else vocabulary_statistics
        gradient = fused_vocabulary_gradient_ if fused else vocabulary_gradient
        wants_x, wants_weight = wanted
        rows = max(_LEAST_ROWS, -(-len(x_ND) * chunk // max(1, len(weight_VD))))
        loss = x_ND.new_zeros((), dtype=torch.float32)
        largest = token_weights_N.abs().amax() if len(x_ND) else loss + 1
        relative_N = token_weights_N / torch.where(largest > 0, largest, 1)
        grad_x_ND = torch.empty_like(x_ND) if wants_x else None
        sum_VD = _WeightGradient(weight_VD) if wants_weight else None
        for start in range(0, len(x_ND), rows):
            part = slice(start, start + rows)
            x_MD, labels_M = x_ND[part], labels_N[part]
            logits_MV = x_MD @ weight_VD.t()
            largest_M, total_M, target_M = statistics(logits_MV, labels_M, 0, classes)
            logsumexp_M = largest_M + total_M.log()
            loss += ((logsumexp_M - target_M) * token_weights_N[part]).sum()
            if not any(wanted):
                continue
            grad_MV = gradient(logits_MV, labels_M, logsumexp_M, relative_N[part], 0, classes)
            if grad_x_ND is not None:
                torch.mm(grad_MV, weight_VD, out=grad_x_ND[part])
            if sum_VD is not None:
                sum_VD.add(grad_MV, x_MD)
            del logits_MV, grad_MV  # before the next ones are made
        ctx.save_for_backward(largest, grad_x_ND, None if sum_VD is None else sum_VD.result())
        return loss

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        largest, grad_x_ND, grad_weight_VD = ctx.saved_tensors
        scaled = [None if x is None else _scaled(x, grads[0] * largest) for x in (grad_x_ND, grad_weight_VD)]
        return *scaled, None, None, None, None, None, None


class _WeightGradient:
    """The sum of products grad^T x over chunks of tokens, in float32 from the second one on."""

    def __init__(self, weight_VD: Tensor) -> None:
        self._product_VD = torch.zeros_like(weight_VD)
        self._sum_VD: Tensor | None = None
        self._chunks = 0

    def add(self, grad_MV: Tensor, x_MD: Tensor) -> None:
        """Another chunk's."""
        if self._chunks == 1:
            self._sum_VD = self._product_VD.to(torch.float32, copy=True)
        torch.mm(grad_MV.t(), x_MD, out=self._product_VD)
        if self._sum_VD is not None:
            for part in _some_rows(self._sum_VD):  # torch makes a float32 copy of what it adds
                self._sum_VD[part] += self._product_VD[part]
        self._chunks += 1

    def result(self) -> Tensor:
        """The sum, in the weight's dtype."""
        return self._product_VD if self._sum_VD is None else self._product_VD.copy_(self._sum_VD)


def _scaled(x_RD: Tensor, scale: Tensor) -> Tensor:
    """x times a scale that is not rounded to its dtype first."""
    y_RD = torch.empty_like(x_RD)
    for part in _some_rows(x_RD):
        y_RD[part] = x_RD[part].float() * scale
    return y_RD


def _some_rows(x_RD: Tensor) -> Iterator[slice]:
    """All rows, some after the others."""
    return (slice(start, start + DEFAULT_CHUNK) for start in range(0, len(x_RD), DEFAULT_CHUNK))
