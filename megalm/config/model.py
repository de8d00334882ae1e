"""The shape of the Transformer: GPT-2 style and Llama style from the same fields."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from megalm.config.base import FixedOnResume, OpenChoice, Section

PositionEmbedding = Literal["learned_absolute", "rope", "none"]
Normalization = Literal["LayerNorm", "RMSNorm"]


class ModelConfig(Section):
    """Sizes and variants of the model."""

    fixed_on_resume: ClassVar = FixedOnResume(weights=True)

    model_family: Annotated[str, OpenChoice(("gpt",))] = "gpt"
    """Family of the model: gpt (decoder-only, GPT-2 and Llama style)."""
    num_layers: int = Field(ge=1)
    """Number of Transformer layers."""
    hidden_size: int = Field(ge=1)
    """Width of the residual stream."""
    num_attention_heads: int = Field(ge=1)
    """Number of query heads of each attention layer."""
    num_query_groups: int | None = Field(None, ge=1)
    """Number of key/value heads (grouped-query attention; 1 is multi-query). Default: num_attention_heads."""
    kv_channels: int | None = Field(None, ge=1)
    """Width of one attention head. Default: hidden_size / num_attention_heads."""
    ffn_hidden_size: int | None = Field(None, ge=1)
    """Width of the MLP. Default: 4 x hidden_size; with --swiglu two thirds of it, rounded up to a multiple of 64."""
    max_position_embeddings: Annotated[int | None, FixedOnResume()] = Field(None, ge=1)
    """Longest sequence that the positions cover. Default: seq_length."""
    vocab_size: int | None = Field(None, ge=1)
    """Number of token ids before padding. Default: the tokenizer's."""
    make_vocab_size_divisible_by: Annotated[int, FixedOnResume()] = Field(128, ge=1)
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""

    position_embedding_type: PositionEmbedding = "learned_absolute"
    """Positions: a learned table (GPT-2), rotary (Llama), or none."""
    rotary_percent: float = Field(1.0, gt=0.0, le=1.0)
    """Share of each head's width that rotary embedding turns."""
    rotary_base: Annotated[float, FixedOnResume()] = Field(10000.0, gt=0.0)
    """Base of the rotary frequencies."""
    rotary_seq_len_interpolation_factor: Annotated[float, FixedOnResume()] = Field(1.0, ge=1.0)
    """Positions are divided by this before rotary embedding (linear interpolation to longer sequences)."""

    normalization: Normalization = "LayerNorm"
    """Normalization before attention, MLP and output head."""
    norm_epsilon: Annotated[float, FixedOnResume()] = Field(1e-5, gt=0.0)
    """Added to the variance inside normalization."""
    apply_layernorm_1p: bool = False
    """Store normalization weights as an offset from one (LayerNorm-1p)."""
    qk_layernorm: bool = False
    """Normalize queries and keys per head before attention."""

    swiglu: bool = False
    """Gated MLP: silu(gate) * up (Llama). Default activation: GELU."""
    squared_relu: bool = False
    """MLP activation relu(x) squared instead of GELU."""
    openai_gelu: bool = False
    """GELU in its tanh approximation (GPT-2's weights use it)."""

    disable_bias_linear: bool = False
    """No biases in linear layers (Llama)."""
    add_qkv_bias: bool = False
    """Biases on the query, key and value projections even with --disable-bias-linear (Qwen)."""
    untie_embeddings_and_output_weights: bool = False
    """Separate weights for the output head instead of the embedding's."""

    attention_dropout: Annotated[float, FixedOnResume()] = Field(0.0, ge=0.0, lt=1.0)
    """Dropout probability on attention weights."""
    hidden_dropout: Annotated[float, FixedOnResume()] = Field(0.0, ge=0.0, lt=1.0)
    """Dropout probability on embeddings and on each residual branch."""
    init_method_std: Annotated[float, FixedOnResume()] = Field(0.02, gt=0.0)
    """Standard deviation of initial weights; output projections are scaled by 1/sqrt(2 x num_layers)."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Channels of each head that rotary embedding turns."""
        return int(self.head_dim * self.rotary_percent)

    @property
    def num_kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Width of the MLP."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.swiglu:
            return -(-(4 * self.hidden_size * 2 // 3) // 64) * 64
        return 4 * self.hidden_size

    @property
    def linear_bias(self) -> bool:
        """Whether the output and MLP projections have biases."""
        return not self.disable_bias_linear

    @property
    def qkv_bias(self) -> bool:
        """Whether the query, key and value projections have biases."""
        return self.linear_bias or self.add_qkv_bias

    @property
    def tied(self) -> bool:
        """Whether the output head uses the embedding's weights."""
        return not self.untie_embeddings_and_output_weights

    def effective(self) -> dict[str, Any]:
        """The values that count: sizes that are left out follow from the others."""
        derived = {
            "num_query_groups": self.num_kv_heads,
            "kv_channels": self.head_dim,
            "ffn_hidden_size": self.ffn_size,
        }
        return super().effective() | derived

    def padded_vocab_size(self, tensor_parallel_size: int = 1) -> int:
        """Rows of the embedding: vocab_size rounded up; rows past vocab_size never get probability."""
        assert self.vocab_size is not None, "vocab_size is filled from the tokenizer before the model is built"
        multiple = self.make_vocab_size_divisible_by * tensor_parallel_size
        return -(-self.vocab_size // multiple) * multiple

    def problems(self) -> list[str]:
        """Everything about these sizes that cannot work together, one text each."""
        found = []
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            found.append(
                f"num_attention_heads={self.num_attention_heads} must divide hidden_size={self.hidden_size}; "
                f"use {_nearest_divisors(self.hidden_size, self.num_attention_heads)}, or give --kv-channels"
            )
        if self.num_attention_heads % self.num_kv_heads:
            found.append(
                f"num_query_groups={self.num_query_groups} must divide num_attention_heads={self.num_attention_heads}; "
                f"use {_nearest_divisors(self.num_attention_heads, self.num_kv_heads)}"
            )
        if self.position_embedding_type == "rope" and (self.rotary_dim % 2 or self.rotary_dim == 0):
            found.append(
                f"rotary embedding turns pairs: head width {self.head_dim} x rotary_percent={self.rotary_percent} "
                f"= {self.rotary_dim} must be even and not 0; change --kv-channels or --rotary-percent"
            )
        if sum((self.swiglu, self.squared_relu, self.openai_gelu)) > 1:
            found.append("swiglu, squared_relu and openai_gelu exclude each other; give one of them")
        if self.apply_layernorm_1p and self.normalization != "LayerNorm":
            found.append("apply_layernorm_1p needs normalization=LayerNorm; drop one of them")
        return found


def _nearest_divisors(number: int, near: int) -> str:
    """The divisors of `number` next to `near`, as a readable list."""
    divisors = sorted((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - near))[:4]
    return " or ".join(str(d) for d in sorted(divisors))
