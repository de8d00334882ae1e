"""The shape of the Transformer: published decoders, from GPT-2 to Gemma 3, and encoders from the same fields."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from megalm.config.base import FixedOnResume, OpenChoice, Section

MOST_LAYERS, WIDEST = 1 << 20, 1 << 30
"""Beyond any model; the rules of a layout go through the divisors of such numbers."""
ENCODER_DECODERS = ("t5",)
"""Families with an encoder and a decoder."""
ENCODERS = ("bert", "electra")
"""Families whose positions see those before and after them."""
PositionEmbedding = Literal["learned_absolute", "rope", "none", "relative"]
RopeScaling = Literal["none", "llama3", "yarn"]
Normalization = Literal["LayerNorm", "RMSNorm"]
NormOrder = Literal["pre", "sandwich", "branch", "post"]
Activation = Literal["gelu", "gelu_tanh", "relu", "squared_relu", "silu"]


def _numbers(value: object) -> object:
    """`"127,0"`, `["127", "0"]`, `["127,0"]` and `5` as tuples of numbers (as far as they are such)."""
    if isinstance(value, str):
        return tuple(value.replace(",", " ").split())
    if isinstance(value, Sequence):
        words = (item.replace(",", " ").split() if isinstance(item, str) else (item,) for item in value)
        return tuple(word for some in words for word in some)
    return value if value is None else (value,)


def _two_numbers(value: object) -> object:
    """What `_numbers` makes of it, if that is two of them."""
    numbers = _numbers(value)
    if isinstance(numbers, tuple) and len(numbers) != 2:
        raise ValueError("takes two numbers, LEFT,RIGHT, such as 127,0")
    return numbers


Window = Annotated[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]], BeforeValidator(_two_numbers)]
Pattern = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_numbers), Field(min_length=1)]


_BERT = {"norm_order": "post", "norm_epsilon": 1e-12, "embedding_norm": True, "num_tokentypes": 2}
FAMILY_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"bert": _BERT, "electra": _BERT}
"""Family -> what its models have where nothing is given and the first of the family had something else."""


class ModelConfig(Section):
    """Sizes and variants of the model."""

    fixed_on_resume: ClassVar = FixedOnResume(weights=True)

    model_family: Annotated[str, OpenChoice(("gpt", "bert", "electra", "t5"))] = "gpt"
    """Family of the model: gpt (decoder-only, GPT-2 and Llama style), bert (encoder-only, BERT to ModernBERT), electra
    (two encoders, a generator and the discriminator that is wanted), or t5 (encoder-decoder)."""
    num_layers: int = Field(ge=1, le=MOST_LAYERS)
    """Number of Transformer layers; of an encoder-decoder those of its encoder."""
    decoder_num_layers: int | None = Field(None, ge=1, le=MOST_LAYERS)
    """Layers of the decoder of an encoder-decoder. Default: num_layers."""
    hidden_size: int = Field(ge=1, le=WIDEST)
    """Width of the residual stream."""
    num_attention_heads: int = Field(ge=1, le=WIDEST)
    """Number of query heads of each attention layer."""
    num_query_groups: int | None = Field(None, ge=1, le=WIDEST)
    """Number of key/value heads (grouped-query attention; 1 is multi-query). Default: num_attention_heads."""
    kv_channels: int | None = Field(None, ge=1, le=WIDEST)
    """Width of one attention head. Default: hidden_size / num_attention_heads."""
    ffn_hidden_size: int | None = Field(None, ge=1, le=WIDEST)
    """Width of the MLP. Default: 4 x hidden_size; of a gated one two thirds of it, rounded up to a multiple of 64."""
    max_position_embeddings: Annotated[int | None, FixedOnResume()] = Field(None, ge=1)
    """Longest sequence that the positions cover. Default: seq_length."""
    decoder_seq_length: Annotated[int | None, FixedOnResume()] = Field(None, ge=1)
    """Tokens of the decoder of an encoder-decoder, whose encoder has seq_length. Default: what span corruption makes of
    a full encoder."""
    vocab_size: int | None = Field(None, ge=1)
    """Number of token ids before padding. Default: the tokenizer's."""
    make_vocab_size_divisible_by: Annotated[int, FixedOnResume()] = Field(128, ge=1)
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""

    position_embedding_type: PositionEmbedding = "learned_absolute"
    """Positions: a learned table (GPT-2), rotary (Llama), terms of the scores by distance (relative: T5's, and with
    --segment-memory Transformer-XL's), or none."""
    relative_attention_num_buckets: int = Field(32, ge=4, le=1 << 20)
    """relative in T5: distances that have a bias of their own; far ones share it, the wider the farther."""
    relative_attention_max_distance: Annotated[int, FixedOnResume()] = Field(128, ge=1)
    """relative in T5: distances from this on share the last bias."""
    segment_memory: Annotated[int | None, FixedOnResume()] = Field(None, ge=1)
    """Every layer also attends to its inputs at so many positions before the sample, which the same row of the batch
    has trained on in the step before (Transformer-XL); needs --sampling consecutive. Default: none."""
    rotary_percent: float = Field(1.0, gt=0.0, le=1.0)
    """Share of each head's width that rotary embedding turns."""
    rotary_base: Annotated[float, FixedOnResume()] = Field(10000.0, gt=0.0)
    """Base of the rotary frequencies."""
    rotary_seq_len_interpolation_factor: Annotated[float, FixedOnResume()] = Field(1.0, ge=1.0)
    """Positions are divided by this before rotary embedding (linear interpolation to longer sequences)."""
    rotary_base_local: Annotated[float | None, FixedOnResume()] = Field(None, gt=0.0)
    """Base of the rotary frequencies in layers with a window, not scaled (Gemma 3). Default: as in the others."""
    rope_scaling: Annotated[RopeScaling, FixedOnResume()] = "none"
    """How rotary frequencies are scaled for sequences longer than those of pre-training: llama3 (Llama 3.1), yarn."""
    rope_scaling_factor: Annotated[float, FixedOnResume()] = Field(8.0, ge=1.0)
    """How many times longer sequences the scaled rotary frequencies are for."""
    rope_scaling_original_max_position_embeddings: Annotated[int, FixedOnResume()] = Field(8192, ge=1)
    """Longest sequence before the rotary frequencies were scaled."""
    rope_low_freq_factor: Annotated[float, FixedOnResume()] = Field(1.0, gt=0.0)
    """llama3: wavelengths longer than the original length / this are scaled."""
    rope_high_freq_factor: Annotated[float, FixedOnResume()] = Field(4.0, gt=0.0)
    """llama3: wavelengths shorter than the original length / this are not scaled."""
    yarn_beta_fast: Annotated[float, FixedOnResume()] = Field(32.0, gt=0.0)
    """yarn: channels that turn more often than this over the original length are not scaled."""
    yarn_beta_slow: Annotated[float, FixedOnResume()] = Field(1.0, gt=0.0)
    """yarn: channels that turn less often than this over the original length are scaled."""
    yarn_attention_factor: Annotated[float | None, FixedOnResume()] = Field(None, gt=0.0)
    """yarn: queries and keys are multiplied by this. Default: 0.1 ln(rope_scaling_factor) + 1."""
    position_embedding_offset: int = Field(0, ge=0)
    """Rows of the table of learned positions before that of the first position (OPT and RoBERTa have 2)."""
    scale_embeddings: bool = False
    """Multiply token embeddings by sqrt(hidden_size) (Gemma)."""
    num_tokentypes: int = Field(0, ge=0)
    """Encoders: number of token types (segments) with an embedding each. Default of the family: 2."""
    embedding_norm: bool = False
    """Encoders: normalize embeddings; before a layer that would do so itself (pre) that one does not. Default of the
    family: true."""
    embedding_size: int | None = Field(None, ge=1, le=WIDEST)
    """Encoders: width of the embeddings, projected to hidden_size after them and back before the output head (ELECTRA).
    Default: hidden_size."""
    bert_no_binary_head: bool = False
    """bert: no pooler and no head that tells whether two texts stand in their order."""
    rtd_generator_size: float = Field(0.25, ge=0.0, le=1.0)
    """electra: share of the discriminator's width, heads and MLP that its generator has, in as many layers; 0: the
    discriminator alone."""
    rtd_loss_weight: Annotated[float, FixedOnResume()] = Field(50.0, ge=0.0)
    """electra: what the discriminator's loss weighs beside the generator's."""

    normalization: Normalization = "LayerNorm"
    """Normalization of attention, MLP and output head."""
    norm_order: NormOrder = "pre"
    """What is normalized: each branch's input (pre), its input and output (sandwich: Gemma), its output (branch:
    OLMo 2), or the sum of stream and branch (post: BERT, and the default there)."""
    use_parallel_residual: bool = False
    """Attention and MLP read the same residual stream, x + attention(norm(x)) + mlp(norm(x)) (GPT-NeoX)."""
    norm_epsilon: Annotated[float, FixedOnResume()] = Field(1e-5, gt=0.0)
    """Added to the variance inside normalization. Default of bert: 1e-12."""
    apply_layernorm_1p: bool = False
    """Store normalization weights as an offset from one (LayerNorm-1p)."""
    disable_bias_norm: bool = False
    """No biases in LayerNorm (ModernBERT)."""
    qk_layernorm: bool = False
    """Normalize queries and keys before attention, each head for itself."""
    qk_layernorm_full_width: bool = False
    """--qk-layernorm over all heads together (OLMo 2)."""

    swiglu: bool = False
    """Gated MLP: silu(gate) * up (Llama). Default activation: GELU."""
    geglu: bool = False
    """Gated MLP: gelu(gate) * up (Gemma, with --openai-gelu in the tanh approximation)."""
    relu: bool = False
    """MLP activation relu(x) instead of GELU (OPT)."""
    squared_relu: bool = False
    """MLP activation relu(x) squared instead of GELU."""
    openai_gelu: bool = False
    """GELU in its tanh approximation (GPT-2's weights use it)."""

    disable_bias_linear: bool = False
    """No biases in linear layers (Llama)."""
    add_qkv_bias: bool = False
    """Biases on the query, key and value projections even with --disable-bias-linear (Qwen)."""
    add_attention_output_bias: bool = False
    """A bias on attention's output projection even with --disable-bias-linear (Llama with attention_bias)."""
    untie_embeddings_and_output_weights: bool = False
    """Separate weights for the output head instead of the embedding's."""
    scale_decoder_outputs: bool | None = None
    """Multiply what the head of a T5 reads by 1 / sqrt(hidden_size). Default: where the head has the weights of the
    embedding (T5 1.0)."""

    window_size: Annotated[Window | None, FixedOnResume()] = None
    """Positions that a query sees before and after its own, LEFT,RIGHT (in a decoder RIGHT is 0). Default: all."""
    window_attn_skip_freq: Annotated[Pattern | None, FixedOnResume()] = None
    """N: every Nth layer sees all positions, the others --window-size; or 1 (window) and 0 (all) for each layer.
    Default: the window holds for every layer."""
    query_pre_attn_scalar: int | None = Field(None, ge=1)
    """Attention scores are divided by the square root of this. Default: the width of a head."""
    attn_logit_softcapping: float | None = Field(None, gt=0.0)
    """Attention scores s become c tanh(s / c) (Gemma 2)."""
    final_logit_softcapping: float | None = Field(None, gt=0.0)
    """Logits x become c tanh(x / c) (Gemma 2)."""

    attention_dropout: Annotated[float, FixedOnResume()] = Field(0.0, ge=0.0, lt=1.0)
    """Dropout probability on attention weights."""
    hidden_dropout: Annotated[float, FixedOnResume()] = Field(0.0, ge=0.0, lt=1.0)
    """Dropout probability on embeddings and on each residual branch."""
    init_method_std: Annotated[float, FixedOnResume()] = Field(0.02, gt=0.0)
    """Standard deviation of initial weights; output projections are scaled by 1/sqrt(2 x num_layers), but for
    norm_order=post."""
    mtp_num_layers: int = Field(0, ge=0)
    """Multi-token prediction: modules that predict the tokens after the next one, one further ahead each (DeepSeek-V3).
    Default: none."""
    mtp_loss_scaling_factor: Annotated[float, FixedOnResume()] = Field(0.1, ge=0.0)
    """What the mean of the losses of --mtp-num-layers modules weighs beside that of the next token."""
    init_method_xavier_uniform: Annotated[bool, FixedOnResume()] = False
    """Initial weights are uniform within sqrt(6 / (inputs + outputs)) instead (Glorot and Bengio 2010); query, key and
    value count as one matrix, and so do gate and up, as in Megatron."""

    @model_validator(mode="before")
    @classmethod
    def _with_family_defaults(cls, values: Any) -> Any:
        """The values over the defaults of their family."""
        if not isinstance(values, dict):
            return values
        return {**FAMILY_DEFAULTS.get(values.get("model_family", ""), {}), **values}

    @property
    def is_encoder(self) -> bool:
        """Whether every position sees those after it too: the model fills in tokens and continues no text."""
        return self.model_family in ENCODERS

    @property
    def has_sentence_head(self) -> bool:
        """Whether an encoder tells whether two texts stand in their order."""
        return self.model_family == "bert" and not self.bert_no_binary_head

    @property
    def generator_layers(self) -> int:
        """Layers of the generator beside an ELECTRA's discriminator; they are numbered before its own."""
        return self.num_layers if self.model_family == "electra" and self.rtd_generator_size else 0

    @property
    def embedding_width(self) -> int:
        """Width of the rows of the embeddings."""
        return self.embedding_size or self.hidden_size

    @property
    def encoder_decoder(self) -> bool:
        """Whether the model reads one sequence with an encoder and writes another with a decoder."""
        return self.model_family in ENCODER_DECODERS

    @property
    def decoder_layers(self) -> int:
        """Layers that follow the encoder's; 0 where there is no encoder."""
        return (self.decoder_num_layers or self.num_layers) if self.encoder_decoder else 0

    @property
    def total_layers(self) -> int:
        """All layers: first an encoder's, then its decoder's; first a generator's, then its discriminator's."""
        return self.num_layers + self.decoder_layers + self.generator_layers

    @property
    def said_layers(self) -> str:
        """The settings that `total_layers` is made of, for messages."""
        own = f"num_layers={self.num_layers}"
        if self.generator_layers:
            return f"twice {own}, generator and discriminator"
        return f"{own} + decoder_num_layers={self.decoder_layers}" if self.encoder_decoder else own

    @property
    def scales_decoder_outputs(self) -> bool:
        """Whether what the head of a T5 reads is scaled."""
        return self.tied if self.scale_decoder_outputs is None else self.scale_decoder_outputs

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
        if self.gated:
            return -(-(4 * self.hidden_size * 2 // 3) // 64) * 64
        return 4 * self.hidden_size

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate."""
        return self.swiglu or self.geglu

    @property
    def activation(self) -> Activation:
        """The function inside the MLP, of its gate if it has one."""
        if self.swiglu:
            return "silu"
        if self.relu:
            return "relu"
        if self.squared_relu:
            return "squared_relu"
        return "gelu_tanh" if self.openai_gelu else "gelu"

    @property
    def softmax_scale(self) -> float:
        """Factor of the attention scores."""
        return float((self.query_pre_attn_scalar or self.head_dim) ** -0.5)

    def window_of(self, layer: int) -> tuple[int, int] | None:
        """Positions (before, after its own) that a query of this layer sees; None: all (a decoder's: all before)."""
        pattern = self.window_attn_skip_freq
        if self.window_size is None or pattern is None:
            return self.window_size
        windowed = (layer + 1) % pattern[0] != 0 if len(pattern) == 1 else pattern[layer] == 1
        return self.window_size if windowed else None

    @property
    def linear_bias(self) -> bool:
        """Whether the projections of the MLP have biases."""
        return not self.disable_bias_linear

    @property
    def qkv_bias(self) -> bool:
        """Whether the query, key and value projections have biases."""
        return self.linear_bias or self.add_qkv_bias

    @property
    def attention_output_bias(self) -> bool:
        """Whether attention's output projection has a bias."""
        return self.linear_bias or self.add_attention_output_bias

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
            "decoder_num_layers": self.decoder_layers or None,
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
        return found + self._variant_problems()

    def _variant_problems(self) -> list[str]:
        found = []
        if sum((self.swiglu, self.geglu or self.openai_gelu, self.relu, self.squared_relu)) > 1:
            found.append(
                "swiglu, geglu, relu, squared_relu and openai_gelu exclude each other (openai_gelu goes with geglu "
                "only); give one of them"
            )
        if self.use_parallel_residual and self.norm_order != "pre":
            found.append(f"use_parallel_residual needs norm_order=pre, not {self.norm_order}; drop one of them")
        if self.qk_layernorm_full_width and not self.qk_layernorm:
            found.append("qk_layernorm_full_width says how --qk-layernorm normalizes; give --qk-layernorm, or drop it")
        if self.qk_layernorm_full_width and self.normalization != "RMSNorm":
            found.append("qk_layernorm_full_width needs normalization=RMSNorm; drop one of them")
        if self.window_size is not None and self.window_size[1] != 0 and not self.is_encoder:
            found.append(f"window_size={_pair(self.window_size)} looks ahead; a decoder needs RIGHT = 0")
        pattern = self.window_attn_skip_freq
        if pattern is not None and self.window_size is None:
            found.append("window_attn_skip_freq says which layers have --window-size; give that, or drop it")
        if pattern is not None and not self._is_window_pattern(pattern):
            found.append(
                f"window_attn_skip_freq={','.join(map(str, pattern))} must be one number from 1 on, or a 0 or 1 for "
                f"each of the num_layers={self.num_layers} layers"
            )
        if self.rope_scaling != "none" and self.position_embedding_type != "rope":
            found.append(f"rope_scaling={self.rope_scaling} needs position_embedding_type=rope; drop one of them")
        if self.rope_scaling == "llama3" and self.rope_low_freq_factor >= self.rope_high_freq_factor:
            found.append(
                f"rope_low_freq_factor={self.rope_low_freq_factor} must be less than "
                f"rope_high_freq_factor={self.rope_high_freq_factor}"
            )
        return found

    def _is_window_pattern(self, pattern: tuple[int, ...]) -> bool:
        if len(pattern) == 1:
            return pattern[0] >= 1
        return len(pattern) == self.num_layers and set(pattern) <= {0, 1}


def _pair(window: tuple[int, int]) -> str:
    return f"{window[0]},{window[1]}"


def divisors_of(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def _nearest_divisors(number: int, near: int) -> str:
    """The divisors of `number` next to `near`, as a readable list."""
    divisors = sorted(divisors_of(number), key=lambda d: abs(d - near))[:4]
    return " or ".join(str(d) for d in sorted(divisors))
