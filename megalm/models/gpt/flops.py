"""Parameters and floating-point operations of a model, from its configuration alone.

Only matrix products count, as in Narayanan et al. 2021 (arXiv:2104.04473, appendix) and Chowdhery et al. 2022 (PaLM,
appendix B): linear layers, attention scores and mixing, and the output head over the padded vocabulary. Embedding
look-ups, norms, activations and softmax do not.
"""

from dataclasses import dataclass

from megalm.config.model import ModelConfig
from megalm.config.parallel import PartitionMethod
from megalm.models.contract import PartCosts


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of a whole model by part; `head` is 0 where it uses the embedding's weights."""

    tokens: int
    positions: int
    layers: int
    final_norm: int
    head: int
    ahead: int = 0
    """Of the modules of multi-token prediction."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.non_embedding

    @property
    def embedding(self) -> int:
        """Parameters whose number depends on vocabulary or sequence length: tokens, positions, untied head."""
        return self.tokens + self.positions + self.head

    @property
    def non_embedding(self) -> int:
        """Layers and final norm: the N of scaling laws (Kaplan et al. 2020, arXiv:2001.08361)."""
        return self.layers + self.final_norm + self.ahead


def num_parameters(config: ModelConfig, padded_vocab_size: int | None = None) -> ParameterCount:
    """Parameters of the model that `GPT(config, padded_vocab_size)` builds.

    Give `config.vocab_size` to leave the padding out (what an exported model holds).
    """
    rows = config.padded_vocab_size() if padded_vocab_size is None else padded_vocab_size
    return ParameterCount(
        tokens=rows * config.hidden_size,
        positions=_position_rows(config) * config.hidden_size,
        layers=config.num_layers * _layer_parameters(config),
        final_norm=_norm_parameters(config, config.hidden_size),
        head=0 if config.tied else rows * config.hidden_size,
        ahead=config.mtp_num_layers * _ahead_parameters(config),
    )


def forward_flops_per_token(
    config: ModelConfig, seq_length: int, padded_vocab_size: int | None = None, causal: bool = True
) -> int:
    """Floating-point operations of one token's forward pass (a multiply-add is 2), mean over a sequence.

    `causal` True counts the scores of each query with the keys that it sees, (seq_length + 1) / 2 on average without a
    window, as Megatron-LM does today; False counts all seq_length keys, as PaLM's 12 L H Q T does and as an unmasked
    product runs.
    """
    rows = config.padded_vocab_size() if padded_vocab_size is None else padded_vocab_size
    # Two products, q k^T and scores x v, each 2 x query_width operations for a query and a key; a third for distances.
    products = 3 if config.position_embedding_type == "relative" else 2
    scores_per_key = 2 * products * config.num_attention_heads * config.head_dim
    scores = sum(
        scores_per_key * _keys(config, layer, seq_length, causal) // seq_length for layer in range(config.num_layers)
    )
    head, layer = 2 * config.hidden_size * rows, 2 * _layer_matrix_elements(config)
    # keys and values of the memory, for each segment
    again = 4 * config.hidden_size * config.num_kv_heads * config.head_dim * (config.segment_memory or 0) // seq_length
    last = scores_per_key * _keys(config, config.num_layers - 1, seq_length, causal) // seq_length
    ahead = 2 * _projection_elements(config) + layer + last + head
    return config.num_layers * (layer + again) + scores + head + config.mtp_num_layers * ahead


def training_flops_per_token(
    config: ModelConfig, seq_length: int, padded_vocab_size: int | None = None, causal: bool = True
) -> int:
    """Operations of one token's forward and backward pass: three times the forward's, without recomputation.

    Each product of the forward has two of its size in the backward, one for either factor. This is the numerator of
    model FLOPs utilization (PaLM, appendix B).
    """
    return 3 * forward_flops_per_token(config, seq_length, padded_vocab_size, causal)


def part_costs(config: ModelConfig, seq_length: int, method: PartitionMethod) -> PartCosts:
    """Parameters (with tied weights the head holds its own copy), or FLOPs of one token's forward pass."""
    if method == "parameters":
        count = num_parameters(config)
        head = count.final_norm + count.ahead + (count.tokens if config.tied else count.head)
        return PartCosts(embedding=count.tokens + count.positions, layer=count.layers // config.num_layers, head=head)
    whole = forward_flops_per_token(config, seq_length)
    alone = forward_flops_per_token(config.model_copy(update={"mtp_num_layers": 0}), seq_length)
    layers = alone - 2 * config.hidden_size * config.padded_vocab_size()
    return PartCosts(embedding=0, layer=layers // config.num_layers, head=whole - layers)


def _keys(config: ModelConfig, layer: int, seq_length: int, causal: bool) -> int:
    """Keys that the queries of one sequence see together, those of its memory among them."""
    memory = config.segment_memory or 0
    if not causal:
        return seq_length * (memory + seq_length)
    return _seen(config, layer, memory + seq_length) - _seen(config, layer, memory)


def _seen(config: ModelConfig, layer: int, length: int) -> int:
    """The same of all positions of a text so long."""
    window = config.window_of(layer)
    seen = length if window is None else min(length, window[0] + 1)
    # the first `seen` queries see 1, 2, ... keys, the others `seen`
    return seen * (seen + 1) // 2 + (length - seen) * seen


def _layer_matrix_elements(config: ModelConfig) -> int:
    """Elements of the weight matrices of one layer."""
    hidden, query_width = config.hidden_size, config.num_attention_heads * config.head_dim
    key_width = config.num_kv_heads * config.head_dim
    attention = hidden * (query_width + 2 * key_width) + query_width * hidden
    return attention + (3 if config.gated else 2) * hidden * config.ffn_size


def _layer_parameters(config: ModelConfig) -> int:
    hidden, head_dim = config.hidden_size, config.head_dim
    norms = 4 if config.norm_order == "sandwich" else 2
    total = _layer_matrix_elements(config) + norms * _norm_parameters(config, hidden)
    if config.qkv_bias:
        total += (config.num_attention_heads + 2 * config.num_kv_heads) * head_dim
    if config.attention_output_bias:
        total += hidden
    if config.linear_bias:
        total += (2 if config.gated else 1) * config.ffn_size + hidden
    if config.position_embedding_type == "relative":
        width = config.num_attention_heads * head_dim
        total += width * hidden + 2 * width
    if config.qk_layernorm_full_width:
        total += _norm_parameters(config, (config.num_attention_heads + config.num_kv_heads) * head_dim)
    elif config.qk_layernorm:
        total += 2 * _norm_parameters(config, head_dim)
    return total


def _ahead_parameters(config: ModelConfig) -> int:
    """Of one module of multi-token prediction: a layer, three norms and a projection."""
    return _layer_parameters(config) + 3 * _norm_parameters(config, config.hidden_size) + _projection_elements(config)


def _projection_elements(config: ModelConfig) -> int:
    return 2 * config.hidden_size**2


def _position_rows(config: ModelConfig) -> int:
    if config.position_embedding_type != "learned_absolute":
        return 0
    return (config.max_position_embeddings or 0) + config.position_embedding_offset


def _norm_parameters(config: ModelConfig, size: int) -> int:
    return size if config.normalization == "RMSNorm" else 2 * size
