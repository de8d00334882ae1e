"""Cross entropy of a linear output head that never holds all logits: the vocabulary goes by in chunks, twice.

Shapes: N tokens, D model width, V rows of the head's weight.
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

CHUNK_LOGITS = 2**25
"""Logits that exist at one time, of all tokens and some columns: 64 MiB in 16 bits."""
LEAST_COLUMNS = 1024
"""Columns of a chunk at least: narrower products are slow."""

Merge = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(largest logit, sum of exp(logit - largest), label's logit) of each token over the rows that are here, to the log of
the sum of exponentials and the label's logit over all."""


def all_rows_here(largest_N: Tensor, sum_N: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """The `Merge` of a weight that is whole."""
    return largest_N + sum_N.log(), target_N


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    num_classes: int | None = None,
    *,
    bias_V: Tensor | None = None,
    first: int = 0,
    merge: Merge = all_rows_here,
    again: Callable[[], Tensor] | None = None,
    chunk: int | None = None,
    fused: bool = False,
) -> Tensor:
    """-log softmax(x weight^T + bias)[label] of every token, float32 (N,); NaN where the label is no class.

    Row j of `weight_VD` is class `first` + j, rows from class `num_classes` on are vocabulary padding: no probability,
    gradient exactly zero. Where other ranks have the other rows, `merge` brings all together; the gradient of `x_ND`
    is then that of the rows here. With `again`, which gives the same `x_ND` in the backward pass, it is not kept.

    Needs N x `chunk` logits of memory instead of N x V, and computes the logits once more in the backward pass; keeps
    nothing but its arguments and the log of the normalizer. Each chunk's logits are rounded to the dtype of x, as a
    linear layer would; sums over chunks are in float32. A backward pass towards some of x, weight and bias computes no
    more than their products.
    Sources: Wijmans et al. 2024, "Cut your losses", arXiv:2411.09009; Liger-Kernel, arXiv:2410.10989.
    """
    classes = first + len(weight_VD) if num_classes is None else num_classes
    columns = chunk or max(LEAST_COLUMNS, CHUNK_LOGITS // max(1, len(x_ND)))
    apply: Callable[..., Tensor] = _LinearCrossEntropy.apply
    return apply(x_ND, weight_VD, bias_V, labels_N, classes, first, merge, again, columns, fused)


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward: statistics chunk by chunk, merged. Backward: each chunk's logits again, then the products wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        classes: int,
        first: int,
        merge: Merge,
        again: Callable[[], Tensor] | None,
        chunk: int,
        fused: bool,
    ) -> Tensor:
        statistics = fused_vocabulary_statistics if fused else vocabulary_statistics
        rows = min(max(classes - first, 0), len(weight_VD))
        largest_N = x_ND.new_full((len(x_ND),), float("-inf"), dtype=torch.float32)
        sum_N, target_N = torch.zeros_like(largest_N), torch.zeros_like(largest_N)
        for start in range(0, rows, chunk):
            stop = min(start + chunk, rows)
            logits_NC = _logits(x_ND, weight_VD, bias_V, slice(start, stop))
            high_N, part_N, label_N = statistics(logits_NC, labels_N, first + start, stop - start)
            del logits_NC  # before the next ones are made
            merged_N = torch.maximum(largest_N, high_N)
            sum_N = sum_N * (largest_N - merged_N).exp() + part_N * (high_N - merged_N).exp()
            largest_N, target_N = merged_N, target_N + label_N
        normalizer_N, target_N = merge(largest_N, sum_N, target_N)
        ctx.save_for_backward(x_ND if again is None else None, weight_VD, bias_V, labels_N, normalizer_N)
        ctx.options = (rows, first, again, chunk, fused)
        return torch.where((labels_N >= 0) & (labels_N < classes), normalizer_N - target_N, float("nan"))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_VD, bias_V, labels_N, normalizer_N = ctx.saved_tensors
        rows, first, again, chunk, fused = ctx.options
        gradient = fused_vocabulary_gradient_ if fused else vocabulary_gradient
        x_ND, scale_N = x_ND if again is None else again(), grads[0].contiguous()
        wants_x, wants_weight, wants_bias = (_goes_on_to(node) for node, _ in ctx.next_functions[:3])
        grad_x_ND = torch.zeros(x_ND.shape, dtype=torch.float32, device=x_ND.device) if wants_x else None
        grad_weight_VD = torch.empty_like(weight_VD) if wants_weight else None
        grad_bias_V = torch.empty_like(bias_V) if bias_V is not None and wants_bias else None
        for gradient_of_rows in (grad_weight_VD, grad_bias_V):
            if gradient_of_rows is not None:
                gradient_of_rows[rows:] = 0
        for start in range(0, rows, chunk):
            stop = min(start + chunk, rows)
            logits_NC = _logits(x_ND, weight_VD, bias_V, slice(start, stop))
            grad_NC = gradient(logits_NC, labels_N, normalizer_N, scale_N, first + start, stop - start)
            if grad_x_ND is not None:
                grad_x_ND += grad_NC @ weight_VD[start:stop]
            if grad_weight_VD is not None:  # a row of the weight belongs to one chunk
                torch.mm(grad_NC.t(), x_ND, out=grad_weight_VD[start:stop])
            if grad_bias_V is not None:
                torch.sum(grad_NC, 0, out=grad_bias_V[start:stop])
            del logits_NC, grad_NC
        return None if grad_x_ND is None else grad_x_ND.to(x_ND.dtype), grad_weight_VD, grad_bias_V, *[None] * 7


def _logits(x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, rows: slice) -> Tensor:
    if bias_V is None:
        return x_ND @ weight_VD[rows].t()
    return torch.addmm(bias_V[rows], x_ND, weight_VD[rows].t())


def _goes_on_to(node: Any) -> bool:
    """Whether the backward pass that runs wants the gradient of `node`.

    Schedules of pipelines that split it want one of two, and a function's `needs_input_grad` says what the forward pass
    knew. torch does not tell of leaves in `torch.autograd.grad`; then it is computed.
    """
    if node is None:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        return True
