"""Causal self-attention with grouped key/value heads, rotary positions, and a cache for generation.

Shapes: B batch, T sequence (queries), S sequence (keys), D model width, H query heads, G key/value heads, C head width,
R rotary width. H and G are the heads that this device holds: they come from the width of the projections' outputs.
"""

from functools import partial

import torch
from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.kernels.attention import torch_attention
from megalm.kernels.backend import REFERENCE, Kernels
from megalm.models.blocks.documents import Documents, document_attention
from megalm.models.blocks.norm import build_norm

RotaryTables = tuple[Tensor, Tensor]


class LayerCache:
    """Keys and values of the positions that one layer has seen; room for `capacity` positions is made at first use."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k_BTGC: Tensor, v_BTGC: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions; return keys and values (B, S, G, C) of all positions so far."""
        if self._keys is None or self._values is None:
            B, _, G, C = k_BTGC.shape
            self._keys = k_BTGC.new_empty(B, self.capacity, G, C)
            self._values = v_BTGC.new_empty(B, self.capacity, G, C)
        stop = self.length + k_BTGC.shape[1]
        assert stop <= self.capacity, f"cache holds {self.capacity} positions, {stop} are needed"
        self._keys[:, self.length : stop] = k_BTGC
        self._values[:, self.length : stop] = v_BTGC
        self.length = stop
        return self._keys[:, :stop], self._values[:, :stop]

    def repeat(self, times: int) -> None:
        """Continue each stored sequence `times` times: the batch grows to times x B."""
        if self._keys is not None and self._values is not None:
            self._keys = self._keys.repeat(times, 1, 1, 1)
            self._values = self._values.repeat(times, 1, 1, 1)


class KVCache:
    """The `LayerCache` of every layer of a model, by layer number, all of one capacity."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._layers: dict[int, LayerCache] = {}

    def layer(self, number: int) -> LayerCache:
        """The cache of one layer."""
        return self._layers.setdefault(number, LayerCache(self.capacity))

    def repeat(self, times: int) -> None:
        """Continue each stored sequence `times` times: the batch grows to times x B."""
        for layer in self._layers.values():
            layer.repeat(times)

    @property
    def length(self) -> int:
        """Positions that every layer has stored."""
        return min((layer.length for layer in self._layers.values()), default=0)


class CausalAttention(nn.Module):
    """softmax(q k^T / sqrt(C)) v where query t sees the keys up to its own position; softmax in float32.

    Has no weights: attention over other layouts of the sequence takes its place by name (`attention.core`).
    Source: Vaswani et al. 2017; grouped heads: Ainslie et al. 2023, arXiv:2305.13245.
    """

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.attend = REFERENCE.attention

    def use_kernels(self, kernels: Kernels) -> None:
        """Take attention over whole sequences or documents, without dropout, from `kernels`."""
        self.attend = kernels.attention

    def forward(self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, documents: Documents | None = None) -> Tensor:
        """Mixed values (B, T, H, C). With S > T the queries are the last T of the S positions.

        With `documents` (then S = T) a query sees the keys of its own document only.
        """
        dropout = self.dropout if self.training else 0.0
        attend = self.attend if dropout == 0.0 else partial(torch_attention, causal=True, dropout=dropout)
        T, S = q_BTHC.shape[1], k_BSGC.shape[1]
        if documents is not None:
            return document_attention(q_BTHC, k_BSGC, v_BSGC, documents, dropout, attend)
        if T == S:
            return attend(q_BTHC, k_BSGC, v_BSGC)
        visible = torch.ones(T, S, dtype=torch.bool, device=q_BTHC.device).tril(S - T) if T > 1 else None
        return torch_attention(q_BTHC, k_BSGC, v_BSGC, causal=False, visible_TS=visible, dropout=dropout)


class Attention(nn.Module):
    """Projections to heads, optional norm of each query and key head, rotary positions, attention, projection back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_width = config.num_attention_heads * self.head_dim
        key_width = config.num_kv_heads * self.head_dim
        self.wq = nn.Linear(config.hidden_size, query_width, bias=config.qkv_bias)
        self.wk = nn.Linear(config.hidden_size, key_width, bias=config.qkv_bias)
        self.wv = nn.Linear(config.hidden_size, key_width, bias=config.qkv_bias)
        self.q_norm = build_norm(config, self.head_dim) if config.qk_layernorm else nn.Identity()
        self.k_norm = build_norm(config, self.head_dim) if config.qk_layernorm else nn.Identity()
        self.core = CausalAttention(config.attention_dropout)
        self.wo = nn.Linear(query_width, config.hidden_size, bias=config.linear_bias)
        self.rotate = REFERENCE.rotary

    def use_kernels(self, kernels: Kernels) -> None:
        """Take rotary embedding from `kernels`."""
        self.rotate = kernels.rotary

    def forward(
        self,
        x_BTD: Tensor,
        rotary: RotaryTables | None = None,
        cache: LayerCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """The branch's output (B, T, D).

        `rotary` holds cosines and sines (B or 1, T, R/2) of the positions of x. With a `cache` x continues the stored
        positions and is stored itself. With `documents` (without a cache) attention stays inside each document.
        """
        q_BTHC = self.q_norm(self._heads(self.wq(x_BTD)))
        k_BTGC = self.k_norm(self._heads(self.wk(x_BTD)))
        v_BTGC = self._heads(self.wv(x_BTD))
        if rotary is not None:
            q_BTHC, k_BTGC = self.rotate(q_BTHC, *rotary), self.rotate(k_BTGC, *rotary)
        if cache is not None:
            k_BTGC, v_BTGC = cache.append(k_BTGC, v_BTGC)
        y_BTD: Tensor = self.wo(self.core(q_BTHC, k_BTGC, v_BTGC, documents).flatten(2))
        return y_BTD

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, heads x C) as (B, T, heads, C); T is read here, because a parallel projection may gather it."""
        return x.view(x.shape[0], x.shape[1], -1, self.head_dim)
