"""Attention inside the documents of packed samples, and of their prefixes: block-diagonal, without a mask of T x T.

Shapes: B batch, T sequence, N = T + 1 room for cumulative lengths, H query heads, G key/value heads, C head width,
M = B x T tokens of the batch, back to back.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CAUSAL = (-1, 0)
"""All positions before a query's own, and none after it."""


ALL = (-1, -1)
"""As torch's kernel for variable lengths says that there is no window."""


@dataclass(frozen=True)
class Documents:
    """The documents of a batch, back to back over its M tokens; none spans two samples."""

    lengths: list[int]
    """Tokens of each document."""
    cu_seqlens: Tensor
    """Where documents start, and M: int32 [documents + 1], on the device of the layers."""
    prefixes: "Prefixes | None" = None
    """What causal attention sees both ways; None: nothing."""

    @classmethod
    def of_batch(
        cls, cu_seqlens_BN: Tensor, device: torch.device, prefix_lengths: Tensor | None = None
    ) -> "Documents | None":
        """The documents of a batch from its cumulative lengths, integers on the host; None: one document each.

        A row holds 0, the end of each document, and T in every place that is left; `prefix_lengths` the tokens of each
        document's prefix in the same places. Built once a batch, for all layers on `device`.
        """
        lengths = cu_seqlens_BN.diff(dim=1).flatten()
        used = lengths > 0
        lengths = lengths[used]
        prefixes = None if prefix_lengths is None else Prefixes.of(lengths, prefix_lengths.flatten()[used], device)
        if len(lengths) == len(cu_seqlens_BN) and prefixes is None:
            return None
        return cls(lengths.tolist(), _starts(lengths).to(device, non_blocking=True), prefixes)


@dataclass(frozen=True)
class Prefixes:
    """The tokens of all prefixes of a batch, in which every position sees the others."""

    places: Tensor
    """Where they stand among the M tokens: int64 [tokens of prefixes], on the device of the layers."""
    documents: Documents
    """The prefixes, back to back."""

    @classmethod
    def of(cls, lengths: Tensor, prefix_lengths: Tensor, device: torch.device) -> "Prefixes | None":
        """Those of documents of such lengths; None where none has more than one token, which sees itself anyway."""
        has = prefix_lengths > 1
        if not has.any():
            return None
        own, first = prefix_lengths[has].long(), _starts(lengths)[:-1][has].long()
        before = own.cumsum(0) - own
        places = torch.arange(int(own.sum())) + torch.repeat_interleave(first - before, own)
        documents = Documents(own.tolist(), _starts(own).to(device, non_blocking=True))
        return cls(places.to(device, non_blocking=True), documents)


def _starts(lengths: Tensor) -> Tensor:
    """Where texts of such lengths start, back to back, and where the last one ends: int32."""
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def document_attention(
    q_BTHC: Tensor,
    k_BTGC: Tensor,
    v_BTGC: Tensor,
    documents: Documents,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
    window: tuple[int, int] = CAUSAL,
) -> Tensor:
    """Mixed values (B, T, H, C): softmax(q k^T / sqrt(C)) v where a query sees its own document up to itself.

    Or, of its own document, the `window` (positions before and after its own; -1: all).
    The documents are taken one by one by `attend`, that attention of one sequence (on two free CPU cores 3 to 10
    times as fast as a dense mask at 2,048 tokens), or together where each is a row; without it in one launch of the
    flash kernel for variable lengths, where that `takes_varlen`. Prefixes are left to `prefix_attention`.
    """
    if attend is not None and documents.lengths == [q_BTHC.shape[1]] * q_BTHC.shape[0]:
        return attend(q_BTHC, k_BTGC, v_BTGC)
    tokens = (q_BTHC.flatten(0, 1), k_BTGC.flatten(0, 1), v_BTGC.flatten(0, 1))
    if attend is None:
        return _attend_at_once(*tokens, documents, window).view_as(q_BTHC)
    return _attend_one_by_one(*tokens, documents, attend).view_as(q_BTHC)


def prefix_attention(
    y_BTHC: Tensor,
    q_BTHC: Tensor,
    k_BTGC: Tensor,
    v_BTGC: Tensor,
    prefixes: Prefixes,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
) -> Tensor:
    """`y_BTHC`, causal attention of whole documents, with that of both ways where prefixes are.

    `attend` is attention of both ways of one sequence; None as in `document_attention`. The scores of a prefix are
    computed one and a half times, and no mask is held.
    Source: Liu et al. 2018, arXiv:1801.10198; Raffel et al. 2020, arXiv:1910.10683, section 3.2.1.
    """
    q, k, v = (x.flatten(0, 1)[prefixes.places][None] for x in (q_BTHC, k_BTGC, v_BTGC))
    y_1PHC = document_attention(q, k, v, prefixes.documents, attend, ALL)
    return y_BTHC.flatten(0, 1).index_copy(0, prefixes.places, y_1PHC[0]).view_as(y_BTHC)


def takes_varlen(q_BTHC: Tensor, dropout: float) -> bool:
    """Whether torch's flash kernel for variable lengths computes this: it has no dropout and no float32."""
    width = q_BTHC.shape[-1]
    half = q_BTHC.dtype in (torch.float16, torch.bfloat16)
    return q_BTHC.is_cuda and half and dropout == 0.0 and width % 8 == 0 and width <= 256


def _attend_at_once(
    q_MHC: Tensor, k_MGC: Tensor, v_MGC: Tensor, documents: Documents, window: tuple[int, int]
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # it loads torch's compiler, for seconds

    starts, longest = documents.cu_seqlens, max(documents.lengths)
    grouped = q_MHC.shape[1] != k_MGC.shape[1]
    y_MHC = varlen_attn(q_MHC, k_MGC, v_MGC, starts, starts, longest, longest, window_size=window, enable_gqa=grouped)
    assert isinstance(y_MHC, Tensor), "no auxiliary output is asked for"
    return y_MHC


def _attend_one_by_one(
    q_MHC: Tensor,
    k_MGC: Tensor,
    v_MGC: Tensor,
    documents: Documents,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    # split, not slices: the backward of a slice writes zeros for the whole batch
    parts = [torch.split(x, documents.lengths) for x in (q_MHC, k_MGC, v_MGC)]
    return torch.cat([attend(q[None], k[None], v[None])[0] for q, k, v in zip(*parts, strict=True)])
