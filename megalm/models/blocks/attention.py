"""Self-attention with grouped key/value heads, rotary positions, and a cache for generation.

Shapes: B batch, T sequence (queries), S sequence (keys), D model width, H query heads, G key/value heads, C head width,
R rotary width. H and G are the heads that this device holds: they come from the width of the projections' outputs.
"""

from functools import partial

import torch
from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.kernels.attention import torch_attention
from megalm.kernels.backend import REFERENCE, Kernels
from megalm.models.blocks.bidirectional import Within
from megalm.models.blocks.documents import Documents, document_attention, prefix_attention, takes_varlen
from megalm.models.blocks.norm import FullWidthRMSNorm, build_qk_norm
from megalm.models.blocks.rotary import Tables
from megalm.models.blocks.windows import softcapped_attention, visible_keys, windowed_attention


class LayerCache:
    """Keys and values of the positions that one layer has seen; room for `capacity` positions is made at first use.

    With a `segment` (its length, and that of its memory) positions see what they saw in training by such segments.
    """

    def __init__(self, capacity: int, segment: tuple[int, int] | None = None) -> None:
        self.capacity, self.segment = capacity, segment
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k_BTGC: Tensor, v_BTGC: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions; return keys and values (B, S, G, C) of all positions so far that they see."""
        if self._keys is None or self._values is None:
            B, _, G, C = k_BTGC.shape
            self._keys = k_BTGC.new_empty(B, self.capacity, G, C)
            self._values = v_BTGC.new_empty(B, self.capacity, G, C)
        stop = self.length + k_BTGC.shape[1]
        assert stop <= self.capacity, f"cache holds {self.capacity} positions, {stop} are needed"
        self._keys[:, self.length : stop] = k_BTGC
        self._values[:, self.length : stop] = v_BTGC
        first = 0
        if self.segment is not None:
            length, memory = self.segment
            begin = self.length // length * length
            assert stop <= begin + length, "new positions are of one segment (`KVCache.pieces`)"
            first = max(0, begin - memory)
        self.length = stop
        return self._keys[:, first:stop], self._values[:, first:stop]

    def repeat(self, times: int) -> None:
        """Continue each stored sequence `times` times: the batch grows to times x B."""
        if self._keys is not None and self._values is not None:
            self._keys = self._keys.repeat(times, 1, 1, 1)
            self._values = self._values.repeat(times, 1, 1, 1)


class SourceCache:
    """Keys and values (B, S, G, C) of the other sequence that a layer attends to, made once."""

    def __init__(self) -> None:
        self.stored: tuple[Tensor, Tensor] | None = None

    def repeat(self, times: int) -> None:
        """As that of a `LayerCache`."""
        if self.stored is not None:
            keys, values = self.stored
            self.stored = keys.repeat(times, 1, 1, 1), values.repeat(times, 1, 1, 1)


class KVCache:
    """The `LayerCache` of every layer of a model, by layer number, all of one capacity and with one `segment`.

    With it the `SourceCache` of layers that attend to another sequence too.
    """

    def __init__(self, capacity: int, segment: tuple[int, int] | None = None) -> None:
        self.capacity, self.segment = capacity, segment
        self._layers: dict[int, LayerCache] = {}
        self._sources: dict[int, SourceCache] = {}

    @classmethod
    def of(cls, config: ModelConfig, capacity: int) -> "KVCache":
        """The cache of a model for texts of so many tokens."""
        length, memory = config.max_position_embeddings, config.segment_memory
        return cls(capacity, None if memory is None or length is None else (length, memory))

    def layer(self, number: int) -> LayerCache:
        """The cache of one layer."""
        return self._layers.setdefault(number, LayerCache(self.capacity, self.segment))

    def source(self, number: int) -> SourceCache:
        """What one layer keeps of the other sequence."""
        return self._sources.setdefault(number, SourceCache())

    def pieces(self, tokens_BT: Tensor) -> tuple[Tensor, ...]:
        """The first tokens of a text, as they are to go through the model: all at once, or segment by segment."""
        assert self.length == 0, "segments begin where the text does"
        return (tokens_BT,) if self.segment is None else torch.split(tokens_BT, self.segment[0], dim=1)

    def repeat(self, times: int) -> None:
        """Continue each stored sequence `times` times: the batch grows to times x B."""
        for layer in self._layers.values():
            layer.repeat(times)
        for source in self._sources.values():
            source.repeat(times)

    @property
    def length(self) -> int:
        """Positions that every layer has stored."""
        return min((layer.length for layer in self._layers.values()), default=0)


class CausalAttention(nn.Module):
    """softmax(scale q k^T) v where query t sees the keys up to its own position; softmax in float32.

    `scale` defaults to 1 / sqrt(C). With a `window` a query sees so many keys before its own, and its own; with a
    `softcap` c scores s become c tanh(s / c).
    Has no weights: attention over other layouts of the sequence takes its place by name (`attention.core`).
    Source: Vaswani et al. 2017; grouped heads: Ainslie et al. 2023, arXiv:2305.13245; windows: Beltagy et al. 2020,
    arXiv:2004.05150; soft-capping: Gemma 2, arXiv:2408.00118.
    """

    def __init__(
        self, dropout: float, *, scale: float | None = None, window: int | None = None, softcap: float | None = None
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.scale = scale
        self.window = window
        self.softcap = softcap
        self.attend = REFERENCE.attention

    def use_kernels(self, kernels: Kernels) -> None:
        """Take attention over whole sequences or documents, without dropout, from `kernels`."""
        self.attend = kernels.attention

    def forward(self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, documents: Documents | None = None) -> Tensor:
        """Mixed values (B, T, H, C). With S > T the queries are the last T of the S positions.

        With `documents` (then S = T) a query sees the keys of its own document only, and one in a prefix those after
        it in the prefix too.
        """
        dropout = self.dropout if self.training else 0.0
        if self.scale is not None and (ratio := self.scale * q_BTHC.shape[-1] ** 0.5) != 1.0:
            q_BTHC = q_BTHC * ratio  # every kernel divides by sqrt(C)
        whole = partial(self._whole_sequence, dropout=dropout)
        T, S = q_BTHC.shape[1], k_BSGC.shape[1]
        if documents is not None:
            at_once = self._is_plain(T) and takes_varlen(q_BTHC, dropout)
            y_BTHC = document_attention(q_BTHC, k_BSGC, v_BSGC, documents, None if at_once else whole)
            if documents.prefixes is None:
                return y_BTHC
            both_ways = None if at_once else partial(self._both_ways, dropout=dropout)
            return prefix_attention(y_BTHC, q_BTHC, k_BSGC, v_BSGC, documents.prefixes, both_ways)
        if T == S:
            return whole(q_BTHC, k_BSGC, v_BSGC)
        return self._masked(q_BTHC, k_BSGC, v_BSGC, visible_keys(T, S, self.window, q_BTHC.device), dropout=dropout)

    def _is_plain(self, length: int) -> bool:
        """Whether it is causal attention and no more, in sequences of this length."""
        return self.softcap is None and (self.window is None or self.window + 1 >= length)

    def _whole_sequence(self, q_BTHC: Tensor, k_BTGC: Tensor, v_BTGC: Tensor, *, dropout: float) -> Tensor:
        T = q_BTHC.shape[1]
        if self._is_plain(T):
            if dropout == 0.0:
                return self.attend(q_BTHC, k_BTGC, v_BTGC)
            return torch_attention(q_BTHC, k_BTGC, v_BTGC, causal=True, dropout=dropout)
        masked = partial(self._masked, dropout=dropout)
        if self.window is not None and self.window + 1 < T:
            return windowed_attention(q_BTHC, k_BTGC, v_BTGC, self.window, masked)
        return masked(q_BTHC, k_BTGC, v_BTGC, visible_keys(T, T, None, q_BTHC.device))

    def _both_ways(self, q_BTHC: Tensor, k_BTGC: Tensor, v_BTGC: Tensor, *, dropout: float) -> Tensor:
        """As in a prefix: a query also sees every key after its own."""
        T, visible = q_BTHC.shape[1], None
        if self.window is not None and self.window + 1 < T:
            visible = torch.ones(T, T, dtype=torch.bool, device=q_BTHC.device).triu(-self.window)
        return self._masked(q_BTHC, k_BTGC, v_BTGC, visible, dropout=dropout)

    def _masked(
        self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, visible: Tensor | None, *, dropout: float
    ) -> Tensor:
        if self.softcap is None:
            return torch_attention(q_BTHC, k_BSGC, v_BSGC, causal=False, visible=visible, dropout=dropout)
        return softcapped_attention(q_BTHC, k_BSGC, v_BSGC, visible, self.softcap, dropout)


class Attention(nn.Module):
    """Projections to heads, optional norm of queries and keys, rotary positions, attention, projection back.

    `core` is the attention itself; causal where none is given.
    """

    def __init__(self, config: ModelConfig, layer: int = 0, core: nn.Module | None = None) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_width = config.num_attention_heads * self.head_dim
        key_width = config.num_kv_heads * self.head_dim
        self.wq = nn.Linear(config.hidden_size, query_width, bias=config.qkv_bias)
        self.wk = nn.Linear(config.hidden_size, key_width, bias=config.qkv_bias)
        self.wv = nn.Linear(config.hidden_size, key_width, bias=config.qkv_bias)
        self.q_norm = build_qk_norm(config, config.num_attention_heads)
        self.k_norm = build_qk_norm(config, config.num_kv_heads)
        self.core = _causal(config, layer) if core is None else core
        self.wo = nn.Linear(query_width, config.hidden_size, bias=config.attention_output_bias)
        self.rotate = REFERENCE.rotary

    def use_kernels(self, kernels: Kernels) -> None:
        """Take rotary embedding from `kernels`."""
        self.rotate = kernels.rotary

    def forward(
        self,
        x_BTD: Tensor,
        rotary: Tables | None = None,
        cache: LayerCache | None = None,
        documents: Within = None,
        before: int = 0,
    ) -> Tensor:
        """The branch's output (B, T, D).

        `rotary` holds cosines and sines (B or 1, T, R/2) of the positions of x. With a `cache` x continues the stored
        positions and is stored itself. With `documents` (without a cache) attention stays inside each document.
        The first `before` positions of x are attended to alone: they have no output.
        """
        queries_BTD = x_BTD[:, before:] if before else x_BTD
        q_BTHC = self._normalized_heads(self.q_norm, self.wq(queries_BTD))
        k_BTGC = self._normalized_heads(self.k_norm, self.wk(x_BTD))
        v_BTGC = self._heads(self.wv(x_BTD))
        if rotary is not None:
            of_queries = [table[:, before:] for table in rotary] if before else rotary
            q_BTHC, k_BTGC = self.rotate(q_BTHC, *of_queries), self.rotate(k_BTGC, *rotary)
        if cache is not None:
            k_BTGC, v_BTGC = cache.append(k_BTGC, v_BTGC)
        y_BTD: Tensor = self.wo(self._mixed(q_BTHC, k_BTGC, v_BTGC, documents).flatten(2))
        return y_BTD

    def _mixed(self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, documents: Within) -> Tensor:
        y_BTHC: Tensor = self.core(q_BTHC, k_BSGC, v_BSGC, documents)
        return y_BTHC

    def _normalized_heads(self, norm: nn.Module, x: Tensor) -> Tensor:
        if isinstance(norm, FullWidthRMSNorm):
            return self._heads(norm(x))
        heads: Tensor = norm(self._heads(x))
        return heads

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, heads x C) as (B, T, heads, C); T is read here, because a parallel projection may gather it."""
        return x.view(x.shape[0], x.shape[1], -1, self.head_dim)


def _causal(config: ModelConfig, layer: int) -> CausalAttention:
    window = config.window_of(layer)
    return CausalAttention(
        config.attention_dropout,
        scale=config.softmax_scale if config.query_pre_attn_scalar else None,
        window=window[0] if window else None,
        softcap=config.attn_logit_softcapping,
    )
