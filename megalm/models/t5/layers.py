"""The layers of T5: attention with biased, unscaled scores, to its own sequence and to the encoder's.

Shapes: B batch, T queries, S keys, D model width, H heads that this device holds, C head width.
Source: Raffel et al. 2020, arXiv:1910.10683, section 2.1.
"""

from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.models.blocks.attention import LayerCache, SourceCache
from megalm.models.blocks.dropout import Dropout
from megalm.models.blocks.mlp import build_mlp
from megalm.models.blocks.norm import build_norm
from megalm.models.blocks.relative import UnscaledAttention


class T5Attention(nn.Module):
    """Projections to heads, attention, projection back; keys and values of the same sequence or of another one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.wq = nn.Linear(width, inner, bias=False)
        self.wk = nn.Linear(width, inner, bias=False)
        self.wv = nn.Linear(width, inner, bias=False)
        self.core = UnscaledAttention(config.attention_dropout)
        self.wo = nn.Linear(inner, width, bias=False)

    def forward(self, x_BTD: Tensor, bias: Tensor | None, cache: LayerCache | None = None) -> Tensor:
        """The branch's output (B, T, D) of a sequence that attends to itself; with a `cache`, of what continues it."""
        q_BTHC = self._heads(self.wq(x_BTD))
        k_BSHC, v_BSHC = self._keys_and_values(x_BTD)
        if cache is not None:
            k_BSHC, v_BSHC = cache.append(k_BSHC, v_BSHC)
        return self._mixed(q_BTHC, k_BSHC, v_BSHC, bias)

    def _keys_and_values(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads(self.wk(x_BSD)), self._heads(self.wv(x_BSD))

    def _mixed(self, q_BTHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, bias: Tensor | None) -> Tensor:
        y_BTD: Tensor = self.wo(self.core(q_BTHC, k_BSHC, v_BSHC, bias).flatten(2))
        return y_BTD

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, heads x C) as (B, T, heads, C); T is read here, because a parallel projection may gather it."""
        return x.view(x.shape[0], x.shape[1], -1, self.head_dim)


class CrossAttention(T5Attention):
    """Attention of the decoder to what the encoder has made."""

    def forward(  # type: ignore[override]
        self, x_BTD: Tensor, memory_BSD: Tensor, seen: Tensor | None, cache: SourceCache | None = None
    ) -> Tensor:
        """The branch's output (B, T, D); `seen` (B, 1, 1, S), bool, tells the encoder's tokens from its padding.

        A `cache` that has keys and values stands for the memory, and gets those of the memory else.
        """
        q_BTHC = self._heads(self.wq(x_BTD))
        stored = None if cache is None else cache.stored
        k_BSHC, v_BSHC = self._keys_and_values(memory_BSD) if stored is None else stored
        if cache is not None:
            cache.stored = k_BSHC, v_BSHC
        return self._mixed(q_BTHC, k_BSHC, v_BSHC, seen)


class EncoderLayer(nn.Module):
    """x + attention(norm(x)), then + mlp(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = build_norm(config, config.hidden_size)
        self.attention = T5Attention(config)
        self.mlp_norm = build_norm(config, config.hidden_size)
        self.mlp = build_mlp(config, config.hidden_dropout)
        self.dropout = Dropout(config.hidden_dropout)

    def forward(self, x_BTD: Tensor, bias: Tensor) -> Tensor:
        """The residual stream (B, T, D) after this layer; `bias` expands to (B, H, T, T)."""
        branch_BTD = self.dropout(self.attention(self.attention_norm(x_BTD), bias))
        normalized_BTD, x_BTD = self.mlp_norm(branch_BTD, x_BTD)
        y_BTD: Tensor = self.dropout(self.mlp(normalized_BTD), x_BTD)
        return y_BTD


class DecoderLayer(nn.Module):
    """As the encoder's, with attention to the encoder's output between the two branches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = build_norm(config, config.hidden_size)
        self.attention = T5Attention(config)
        self.cross_attention_norm = build_norm(config, config.hidden_size)
        self.cross_attention = CrossAttention(config)
        self.mlp_norm = build_norm(config, config.hidden_size)
        self.mlp = build_mlp(config, config.hidden_dropout)
        self.dropout = Dropout(config.hidden_dropout)

    def forward(
        self,
        x_BTD: Tensor,
        memory_BSD: Tensor,
        bias: Tensor,
        seen: Tensor | None,
        own: LayerCache | None = None,
        source: SourceCache | None = None,
    ) -> Tensor:
        """The residual stream (B, T, D) after this layer; both caches or neither."""
        branch_BTD = self.dropout(self.attention(self.attention_norm(x_BTD), bias, own))
        normalized_BTD, x_BTD = self.cross_attention_norm(branch_BTD, x_BTD)
        branch_BTD = self.dropout(self.cross_attention(normalized_BTD, memory_BSD, seen, source))
        normalized_BTD, x_BTD = self.mlp_norm(branch_BTD, x_BTD)
        y_BTD: Tensor = self.dropout(self.mlp(normalized_BTD), x_BTD)
        return y_BTD
