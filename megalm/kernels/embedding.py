"""Gradient of an embedding table: sums of token gradients by id, in float32, in an order that never changes."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.kernels.self_test import Check, Numbers, with_gradient
from megalm.kernels.support import fused_takes


def embedding(ids: Tensor, table_VD: Tensor) -> Tensor:
    """Rows of the table at integer `ids`: shape ids.shape + (D,)."""
    return F.embedding(ids, table_VD)


def fused_embedding(ids: Tensor, table_VD: Tensor) -> Tensor:
    """`embedding` whose gradient sums in float32, without atomics, and is the same in every run."""
    if not fused_takes(table_VD):
        return embedding(ids, table_VD)
    apply: Callable[[Tensor, Tensor], Tensor] = _Embedding.apply
    return apply(ids, table_VD)


class _Embedding(torch.autograd.Function):
    """Forward: a gather. Backward: sort the ids, then sum each row's tokens."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, table_VD: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = table_VD.shape[0]
        return F.embedding(ids, table_VD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        positions, order = torch.sort(ids.flatten().long(), stable=True)
        return None, torch.ops.megalm.embedding_backward(grads[0], positions, order, ctx.rows)


def register() -> None:
    """Fake implementation."""
    torch.library.register_fake(
        "megalm::embedding_backward", lambda grad, ids, order, rows: grad.new_empty(rows, grad.shape[-1])
    )


def check_embedding(numbers: Numbers, cols: int) -> tuple[Tensor, Tensor]:
    """With its gradient."""
    table, ids = numbers(7, cols), torch.tensor([[5, 1, 5], [0, 5, 3]])
    return (
        with_gradient(lambda table: fused_embedding(ids, table), table),
        with_gradient(lambda table: embedding(ids, table), table),
    )


CHECKS: tuple[Check, ...] = (check_embedding,)
