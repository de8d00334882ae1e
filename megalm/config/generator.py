"""The generator of an ELECTRA: a smaller encoder beside the discriminator, whose sizes are a share of its own.

Source: Clark et al. 2020 (ELECTRA), arXiv:2003.10555, section 3.2; `get_generator_config` of its own code.
"""

from megalm.config.model import ModelConfig, divisors_of

_ROUNDING = 0.01
"""A third may be written 0.3333."""


def generator_heads(model: ModelConfig) -> int:
    """Attention heads of the generator, as wide as the discriminator's."""
    return round(model.num_attention_heads * model.rtd_generator_size)


def generator_of(model: ModelConfig) -> ModelConfig:
    """The generator as an encoder of its own; its embeddings are the discriminator's."""
    heads, whole = generator_heads(model), model.num_attention_heads
    smaller = {
        "model_family": "bert",
        "bert_no_binary_head": True,
        "hidden_size": model.hidden_size * heads // whole,
        "num_attention_heads": heads,
        "embedding_size": model.embedding_width,
    }
    if model.ffn_hidden_size is not None:
        smaller["ffn_hidden_size"] = model.ffn_hidden_size * heads // whole
    return model.model_copy(update=smaller)


def generator_problems(model: ModelConfig) -> list[str]:
    """What of the discriminator's sizes cannot be cut to the generator's."""
    if not model.generator_layers:
        return []
    whole, heads = model.num_attention_heads, generator_heads(model)
    if not heads or abs(whole * model.rtd_generator_size - heads) > _ROUNDING:
        shares = ", ".join(f"{count / whole:.4g}" for count in divisors_of(whole))
        return [
            f"rtd_generator_size={model.rtd_generator_size:g} of num_attention_heads={whole} is no whole number of "
            f"heads; use a multiple of {1 / whole:.4g}, as {shares}"
        ]
    return [
        f"rtd_generator_size={model.rtd_generator_size:g} of {name}={size} is no whole number; use a multiple of "
        f"{whole} for {name}"
        for name, size in (("hidden_size", model.hidden_size), ("ffn_hidden_size", model.ffn_hidden_size or 0))
        if size * heads % whole and not (name == "hidden_size" and model.kv_channels is None)  # heads divide it
    ]
