"""Parameters and floating-point operations of an encoder-decoder, from its configuration alone.

Only matrix products count: linear layers, attention scores and mixing, the output head over the padded vocabulary. A
sample is `seq_length` tokens of the encoder and `decoder_seq_length` of the decoder; "per token" is per token of the
encoder, as the tokens of a run are counted.
"""

from megalm.config.model import ModelConfig
from megalm.config.parallel import PartitionMethod
from megalm.models.contract import PartCosts


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the whole model, vocabulary padding included."""
    vocabulary = config.padded_vocab_size() * config.hidden_size * (1 if config.tied else 2)
    norms, tables = 2 * config.hidden_size, 2 * config.relative_attention_num_buckets * config.num_attention_heads
    return vocabulary + norms + tables + sum(_layer_parameters(config))


def training_flops_per_token(config: ModelConfig, seq_length: int, padded_vocab_size: int | None = None) -> int:
    """Operations of a sample's forward and backward pass, three times the forward's, for each of its encoder tokens."""
    rows = config.padded_vocab_size() if padded_vocab_size is None else padded_vocab_size
    return 3 * (sum(_layer_flops(config, seq_length)) + _head_flops(config, rows)) // seq_length


def part_costs(config: ModelConfig, seq_length: int, method: PartitionMethod) -> PartCosts:
    """Parameters (with tied weights the head holds its own copy), or FLOPs of one sample's forward pass."""
    rows = config.padded_vocab_size()
    if method == "flops":
        return PartCosts(embedding=0, layers=_layer_flops(config, seq_length), head=_head_flops(config, rows))
    table = rows * config.hidden_size
    positions = 2 * config.relative_attention_num_buckets * config.num_attention_heads
    head = table + config.hidden_size
    return PartCosts(embedding=table + positions, layers=_layer_parameters(config), head=head)


def _layer_parameters(config: ModelConfig) -> tuple[int, ...]:
    """Of each layer, the encoder's first."""
    attention, mlp, norm = _attention_elements(config), _mlp_elements(config), config.hidden_size
    encoder = attention + mlp + 2 * norm
    return (encoder,) * config.num_layers + (encoder + attention + norm,) * config.decoder_layers


def _layer_flops(config: ModelConfig, seq_length: int) -> tuple[int, ...]:
    """Forward pass of one sample through each layer, the encoder's first."""
    S, T = seq_length, config.decoder_seq_length or 0
    attention, mlp = _attention_elements(config), _mlp_elements(config)
    scores_per_pair = 4 * config.num_attention_heads * config.head_dim  # q k^T and scores x v
    encoder = 2 * S * (attention + mlp) + scores_per_pair * S * S
    # of cross-attention queries and output are the decoder's, keys and values the encoder's
    decoder = 2 * T * (attention + mlp) + (T + S) * attention + scores_per_pair * (T * (T + 1) // 2 + T * S)
    return (encoder,) * config.num_layers + (decoder,) * config.decoder_layers


def _head_flops(config: ModelConfig, rows: int) -> int:
    return 2 * (config.decoder_seq_length or 0) * config.hidden_size * rows


def _attention_elements(config: ModelConfig) -> int:
    return 4 * config.hidden_size * config.num_attention_heads * config.head_dim


def _mlp_elements(config: ModelConfig) -> int:
    return (3 if config.gated else 2) * config.hidden_size * config.ffn_size
