"""Settings that follow from the rest of the run."""

from megalm.config.model import ModelConfig
from megalm.config.sections import RunConfig
from megalm.config.spans import decoder_seq_length
from megalm.errors import ConfigError


def complete_model(config: RunConfig, tokenizer_vocab_size: int | None) -> ModelConfig:
    """The model's configuration with its vocabulary size, its number of positions and the length of its decoder.

    Raises:
        ConfigError: the vocabulary size is unknown or too small for the tokenizer.
    """
    model = config.model
    vocab_size = model.vocab_size or tokenizer_vocab_size
    if vocab_size is None:
        raise ConfigError(
            "the vocabulary size is unknown; give the tokenizer of the data (--tokenizer-model FILE) or --vocab-size"
        )
    if tokenizer_vocab_size is not None and vocab_size < tokenizer_vocab_size:
        raise ConfigError(
            f"vocab_size={vocab_size} is less than the tokenizer's {tokenizer_vocab_size}; drop --vocab-size"
        )
    positions = model.max_position_embeddings or config.batch.seq_length
    found = {"vocab_size": vocab_size, "max_position_embeddings": positions}
    return model.model_copy(update=found | {"decoder_seq_length": decoder_seq_length(config)})
