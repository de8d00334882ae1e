"""Attention of encoders: every position sees those before and after it, within its text and its window.

Shapes: B batch, T sequence, H query heads, G key/value heads, C head width, N blocks, L positions of a block.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.kernels.attention import torch_attention
from megalm.models.blocks.documents import ALL, Documents, document_attention, takes_varlen
from megalm.models.blocks.windows import MIN_BLOCK

Window = tuple[int, int]


@dataclass(frozen=True)
class Padding:
    """Which positions of each row are tokens and no padding."""

    real: Tensor
    """bool (B, T)."""


Within = Documents | Padding | None
"""What of its row a position sees."""


class BidirectionalAttention(nn.Module):
    """softmax(scale q k^T) v over all keys, or those of a `window` (before, after a query's own); softmax in float32.

    `scale` defaults to 1 / sqrt(C). Takes the place of causal attention by name (`attention.core`).
    Source: Devlin et al. 2019, arXiv:1810.04805; windows on both sides: Beltagy et al. 2020, arXiv:2004.05150.
    """

    def __init__(self, dropout: float, *, scale: float | None = None, window: Window | None = None) -> None:
        super().__init__()
        self.dropout = dropout
        self.scale = scale
        self.window = window

    def forward(self, q_BTHC: Tensor, k_BTGC: Tensor, v_BTGC: Tensor, within: Within = None) -> Tensor:
        """Mixed values (B, T, H, C): of its own document, or of what is no padding; what padding gets is of no use."""
        dropout = self.dropout if self.training else 0.0
        if self.scale is not None and (ratio := self.scale * q_BTHC.shape[-1] ** 0.5) != 1.0:
            q_BTHC = q_BTHC * ratio  # every kernel divides by sqrt(C)
        if isinstance(within, Padding):
            visible = _visible(q_BTHC.shape[1], self.window, within.real)
            return torch_attention(q_BTHC, k_BTGC, v_BTGC, causal=False, visible=visible, dropout=dropout)
        whole = partial(self._whole_sequence, dropout=dropout)
        if within is None:
            return whole(q_BTHC, k_BTGC, v_BTGC)
        one_by_one = None if takes_varlen(q_BTHC, dropout) else whole
        return document_attention(q_BTHC, k_BTGC, v_BTGC, within, one_by_one, self.window or ALL)

    def _whole_sequence(self, q_BTHC: Tensor, k_BTGC: Tensor, v_BTGC: Tensor, *, dropout: float) -> Tensor:
        T, window = q_BTHC.shape[1], self.window
        if window is None or min(window) >= T - 1:
            return torch_attention(q_BTHC, k_BTGC, v_BTGC, causal=False, dropout=dropout)
        L = max(*window, MIN_BLOCK)
        if T <= 3 * L:
            visible = _in_window(T, T, 0, window, q_BTHC.device)
            return torch_attention(q_BTHC, k_BTGC, v_BTGC, causal=False, visible=visible, dropout=dropout)
        return _attend_in_blocks(q_BTHC, k_BTGC, v_BTGC, window, L, dropout)


def _attend_in_blocks(q_BTHC: Tensor, k_BTGC: Tensor, v_BTGC: Tensor, window: Window, L: int, dropout: float) -> Tensor:
    """(B, T, H, C) by T x 3 L scores: a block at least as long as the window sees no more than its two neighbours."""
    B, T, _, C = q_BTHC.shape
    N = -(-T // L)
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, N * L - T)).reshape(B, N, L, -1, C) for x in (q_BTHC, k_BTGC, v_BTGC))
    k, v = (_with_neighbours(x) for x in (k, v))
    place = torch.arange(-L, N * L + L, device=q.device)  # of every key that some block sees
    is_there = ((place >= 0) & (place < T)).unfold(0, 3 * L, L)
    near = _in_window(L, 3 * L, -L, window, q.device)
    own = _in_window(L, 3 * L, -L, (0, 0), q.device)  # past the end there is no other key
    visible = ((near & is_there[:, None]) | own)[:, None]
    y = torch_attention(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), causal=False, visible=visible.repeat(B, 1, 1, 1),
        dropout=dropout,
    )  # fmt: skip
    return y.reshape(B, N * L, -1, C)[:, :T]


def _with_neighbours(x_BNLGC: Tensor) -> Tensor:
    """Each block with the one before and the one after it, zeros beyond the ends."""
    padded = F.pad(x_BNLGC, (0, 0, 0, 0, 0, 0, 1, 1))
    return torch.cat((padded[:, :-2], x_BNLGC, padded[:, 2:]), dim=2)


def _in_window(T: int, S: int, first: int, window: Window, device: torch.device) -> Tensor:
    """Which of S keys, at positions from `first` on, the queries 0 .. T - 1 have in their window: bool (T, S)."""
    ahead = torch.arange(first, first + S, device=device) - torch.arange(T, device=device)[:, None]
    return (ahead >= -window[0]) & (ahead <= window[1])


def _visible(T: int, window: Window | None, real_BT: Tensor) -> Tensor:
    """bool (B, 1, T, T); every query sees itself, so that padding has something to see."""
    visible = real_BT[:, None, None, :]
    if window is not None:
        visible = visible & _in_window(T, T, 0, window, real_BT.device)
    return visible | torch.eye(T, dtype=torch.bool, device=real_BT.device)
