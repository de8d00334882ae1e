"""Softmax of attention scores, scaled and masked, for the attention paths without a flash kernel.

Shapes: B batch, H heads, T queries, S keys.
"""

from typing import Any

import torch
from torch import Tensor

from megalm.kernels.support import fused_takes


def masked_softmax(
    scores_BHTS: Tensor,
    scale: float,
    *,
    causal: bool = False,
    visible: Tensor | None = None,
    query_documents_BT: Tensor | None = None,
    key_documents_BS: Tensor | None = None,
) -> Tensor:
    """softmax(scale x scores) over the keys that a query sees, float32 inside, in the dtype of the scores.

    `visible` is bool, (B or 1, H or 1, T or 1, S); `causal` lets query t see the keys up to t + S - T; documents
    (int64, both or none) let equal numbers see each other. A query that sees nothing gets zeros.
    """
    T, S = scores_BHTS.shape[-2:]
    hidden = torch.zeros(1, 1, T, S, dtype=torch.bool, device=scores_BHTS.device)
    if causal:
        hidden = hidden | torch.ones(T, S, dtype=torch.bool, device=scores_BHTS.device).tril(S - T).logical_not()
    if visible is not None:
        hidden = hidden | ~visible
    if query_documents_BT is not None and key_documents_BS is not None:
        hidden = hidden | (query_documents_BT[:, None, :, None] != key_documents_BS[:, None, None, :])
    wide = scores_BHTS if scores_BHTS.dtype == torch.float64 else scores_BHTS.float()
    probabilities = torch.softmax((wide * scale).masked_fill(hidden, float("-inf")), -1)
    return probabilities.masked_fill(hidden, 0.0).to(scores_BHTS.dtype)


def fused_masked_softmax(
    scores_BHTS: Tensor,
    scale: float,
    *,
    causal: bool = False,
    visible: Tensor | None = None,
    query_documents_BT: Tensor | None = None,
    key_documents_BS: Tensor | None = None,
) -> Tensor:
    """`masked_softmax` in one pass; no mask of T x S is made for causality or documents."""
    if not fused_takes(scores_BHTS):
        return masked_softmax(
            scores_BHTS,
            scale,
            causal=causal,
            visible=visible,
            query_documents_BT=query_documents_BT,
            key_documents_BS=key_documents_BS,
        )
    y: Tensor = torch.ops.megalm.softmax(scores_BHTS, visible, query_documents_BT, key_documents_BS, scale, causal)
    return y


def register() -> None:
    """Fake implementations and gradient."""
    torch.library.register_fake(
        "megalm::softmax", lambda scores, visible, queries, keys, scale, causal: scores.new_empty(scores.shape)
    )
    torch.library.register_fake("megalm::softmax_backward", lambda grad, y, scale: y.new_empty(y.shape))
    torch.library.register_autograd("megalm::softmax", _backward, setup_context=_setup)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.scale = inputs[4]
    ctx.save_for_backward(output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (y,) = ctx.saved_tensors
    return torch.ops.megalm.softmax_backward(grad, y, ctx.scale), None, None, None, None, None
