"""Attention that is more than causal: windows, which look back a little only, and soft-capped scores.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, C head width, N blocks, L positions of a block.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Masked = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Attention of queries (B, T, H, C) to the keys and values (B, S, G, C) that a mask leaves them."""
MIN_BLOCK = 64
"""Shorter blocks have too little work each."""


def visible_keys(T: int, S: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which keys each query sees, bool (T, S): those up to its own position, with a window so many before it.

    The queries are the last T of the S positions. None: all of them see all.
    """
    if T == 1 and (window is None or window + 1 >= S):
        return None
    visible = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    return visible if window is None else visible.triu(S - T - window)


def windowed_attention(q_BTHC: Tensor, k_BTGC: Tensor, v_BTGC: Tensor, window: int, masked: Masked) -> Tensor:
    """Causal attention to `window` keys before a query's own, and its own: (B, T, H, C), T x window scores in all.

    The sequence is cut into blocks at least as long as the window: a query sees no more than its block and the one
    before.
    """
    B, T, _, C = q_BTHC.shape
    L = max(window, MIN_BLOCK)
    N = -(-T // L)
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, N * L - T)).reshape(B, N, L, -1, C) for x in (q_BTHC, k_BTGC, v_BTGC))
    k, v = (torch.cat((F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1], x), dim=2) for x in (k, v))
    visible = torch.ones(N, 1, L, 2 * L, dtype=torch.bool, device=q.device).tril(L).triu(L - window)
    visible[0, :, :, :L] = False  # before the first block there is nothing
    y = masked(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), visible.repeat(B, 1, 1, 1))
    return y.reshape(B, N * L, -1, C)[:, :T]


def softcapped_attention(
    q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, visible: Tensor | None, softcap: float, dropout: float
) -> Tensor:
    """softmax(c tanh(q k^T / sqrt(C) / c)) v over the visible keys, softmax in float32: (B, T, H, C).

    No kernel of torch's has the cap, so all scores are held. `visible` expands to (B, H, T, S).
    """
    B, T, H, C = q_BTHC.shape
    G = k_BSGC.shape[2]
    q_BGRTC = q_BTHC.view(B, T, G, H // G, C).permute(0, 2, 3, 1, 4)
    scores = torch.einsum("bgrtc,bsgc->bgrts", q_BGRTC, k_BSGC) * C**-0.5
    scores = (torch.tanh(scores / softcap) * softcap).flatten(1, 2)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    weights = F.dropout(scores.softmax(dim=-1, dtype=torch.float32), dropout).to(q_BTHC.dtype)
    grouped = weights.reshape(B, G, H // G, T, -1)
    return torch.einsum("bgrts,bsgc->btgrc", grouped, v_BSGC).reshape(B, T, H, C)
