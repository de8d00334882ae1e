"""Attention inside the documents of packed samples: block-diagonal causal attention without a mask of T x T.

Shapes: B batch, T sequence, N = T + 1 room for cumulative lengths, H query heads, G key/value heads, C head width,
M = B x T tokens of the batch, back to back.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """The documents of a batch, back to back over its M tokens."""

    lengths: tuple[int, ...]
    """Tokens of each document; no document spans two samples."""

    @classmethod
    def of_batch(cls, cu_seqlens_BN: Tensor, device: torch.device) -> "Documents | None":
        """The documents of a batch from its cumulative lengths, integers on the host; None: one document each.

        A row holds 0, the end of each document, and T in every place that is left. Built once a batch, for all layers
        on `device`.
        """
        lengths = [length for row in cu_seqlens_BN.diff(dim=1).tolist() for length in row if length]
        return None if len(lengths) == len(cu_seqlens_BN) else cls(tuple(lengths))


def document_attention(q_BTHC: Tensor, k_BTGC: Tensor, v_BTGC: Tensor, documents: Documents, dropout: float) -> Tensor:
    """Mixed values (B, T, H, C): softmax(q k^T / sqrt(C)) v where a query sees its own document up to itself."""
    # split, not slices: the backward of a slice writes zeros for the whole batch
    parts = [torch.split(x.flatten(0, 1), documents.lengths) for x in (q_BTHC, k_BTGC, v_BTGC)]
    outputs = []
    for document in zip(*parts, strict=True):
        q, k, v = (part[None].transpose(1, 2) for part in document)
        grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=grouped)
        outputs.append(y.transpose(1, 2)[0])
    return torch.cat(outputs).view_as(q_BTHC)
