"""Attention with biased, unscaled scores (T5): biases by the distance of query and key, shared by a stack's layers.

Shapes: B batch, T queries, S keys, N buckets, H heads that this device holds, C head width.
Source: Raffel et al. 2020, arXiv:1910.10683, section 2.1; the buckets are those of Mesh TensorFlow's transformer.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.config.model import ModelConfig


class RelativePositions(nn.Module):
    """The tables of both stacks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = (config.relative_attention_num_buckets, config.num_attention_heads)
        self.encoder = nn.Parameter(torch.empty(shape))
        self.decoder = nn.Parameter(torch.empty(shape))

    def forward(self) -> Tensor:
        """Both tables (2, N, H): the encoder's and the decoder's, as the stream takes them to the layers."""
        return torch.stack((self.encoder, self.decoder))


class RelativeBias(nn.Module):
    """What a table says of the pairs of positions of a sequence. Has no weights."""

    def __init__(self, config: ModelConfig, *, causal: bool) -> None:
        super().__init__()
        self.max_distance = config.relative_attention_max_distance
        self.causal = causal

    def forward(self, table_NH: Tensor, length: int, before: int = 0) -> Tensor:
        """The bias (1, H, T, S) of the scores; in a causal one, of later keys -inf.

        `length` is that of the queries, which are the last of the S = `before` + T positions.
        """
        positions_S = torch.arange(before + length, device=table_NH.device)
        distances_TS = positions_S[None, :] - positions_S[before:, None]
        buckets_TS = buckets(distances_TS, len(table_NH), self.max_distance, causal=self.causal)
        bias_HTS = table_NH.t()[:, buckets_TS]
        if self.causal:
            bias_HTS = bias_HTS.masked_fill(distances_TS > 0, float("-inf"))
        return bias_HTS[None]


class UnscaledAttention(nn.Module):
    """softmax(q k^T + bias) v; T5 has the scale in the initial values of its queries. Has no weights."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, q_BTHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, bias: Tensor | None = None) -> Tensor:
        """Mixed values (B, T, H, C). `bias` expands to (B, H, T, S): added to the scores, or bool: which keys count."""
        y_BHTC = F.scaled_dot_product_attention(
            q_BTHC.transpose(1, 2),
            k_BSHC.transpose(1, 2),
            v_BSHC.transpose(1, 2),
            attn_mask=bias,
            dropout_p=self.dropout if self.training else 0.0,
            scale=1.0,
        )
        return y_BHTC.transpose(1, 2)


def buckets(distances: Tensor, count: int, max_distance: int, *, causal: bool) -> Tensor:
    """The bucket of each distance (key - query), in [0, count); a causal stack has no buckets for later keys.

    Half of a direction's buckets are for one distance each, the others for ranges that grow with the logarithm, up to
    `max_distance`.
    """
    first = torch.zeros_like(distances)
    if causal:
        away = (-distances).clamp_min(0)
    else:
        count //= 2
        first = (distances > 0) * count
        away = distances.abs()
    exact = count // 2
    # float32 and in this order, as the published models were trained: the edges of buckets depend on it
    far = torch.log(away.clamp_min(1).float() / exact) / math.log(max_distance / exact) * (count - exact)
    wide = (exact + far.long()).clamp_max(count - 1)
    return first + torch.where(away < exact, away, wide)
