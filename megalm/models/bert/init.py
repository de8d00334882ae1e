"""Initial values of encoders, parameter by parameter."""

from torch import Tensor

from megalm.config.model import ModelConfig
from megalm.models.blocks import initial_values as values


def initial_value(name: str, shape: values.Shape, config: ModelConfig, seed: int) -> Tensor:
    """The whole initial tensor of parameter `name`, float32 on CPU: a pure function of its arguments.

    `name` and `shape` are those of the one-device model, vocabulary padding (zero) included. Weights are normal with
    standard deviation init_method_std, as in BERT; where norms stand before the branches, output projections of
    attention and MLP with init_method_std / sqrt(2 x num_layers). Norms start as the identity, biases at zero.
    Raises ConfigError where the table of rules has no rule, or more than one, for `name`.
    """
    return values.value_by_rules(RULES, "megalm/models/bert/init.py", name, shape, config, seed)


_NORMS = r"(layers\.\d+\.((attention|mlp)(_output)?|attention\.[qk])_norm|final_norm|(embedding|lm_head)\.norm)"
RULES: values.Rules = (
    (r"embedding\.tokens\.weight", values.vocabulary),
    (r"head\.weight", values.vocabulary),
    (r"embedding\.(positions|token_types|projection)\.weight", values.matrix),
    (r"lm_head\.dense\.weight", values.matrix),
    (r"sentence_head\.(pooler|classifier)\.weight", values.matrix),
    (r"layers\.\d+\.attention\.w[qkv]\.weight", values.query_key_value),
    (r"layers\.\d+\.mlp\.w_(gate|up)\.weight", values.gate_up),
    (r"layers\.\d+\.(attention\.wo|mlp\.w_down)\.weight", values.output_projection),
    (r"layers\.\d+\.(attention\.w[qkvo]|mlp\.w_(gate|up|down))\.bias", values.zeros),
    (r"(embedding\.projection|lm_head\.dense|sentence_head\.(pooler|classifier)|head_bias)\.bias", values.zeros),
    (rf"{_NORMS}\.weight", values.norm_weight),
    (rf"{_NORMS}\.bias", values.zeros),
)
