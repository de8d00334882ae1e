"""Initial values of decoders, parameter by parameter."""

import torch
from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.errors import ConfigError
from megalm.models.blocks import initial_values as values


def initial_value(name: str, shape: values.Shape, config: ModelConfig, seed: int) -> Tensor:
    """The whole initial tensor of parameter `name`, float32 on CPU: a pure function of its arguments.

    `name` and `shape` are those of the one-device model (for vocabulary tables: with padding, whose rows are zero; the
    other rows do not depend on the padding). Linear and embedding weights are normal with standard deviation
    init_method_std, output projections of attention and MLP with init_method_std / sqrt(2 x num_layers) (GPT-2, Radford
    et al. 2019, section 2.3), or all of them are as init_method_xavier_uniform says; norms start as the identity,
    biases at zero.
    Raises ConfigError where the table of rules has no rule, or more than one, for `name`.
    """
    return values.value_by_rules(_RULES, "megalm/models/gpt/init.py", name, shape, config, seed)


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Set every parameter of a whole (unsliced) model, in place, to its initial value, cast to its dtype.

    Raises ConfigError for parameters on the meta device and for names without a rule.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ConfigError(f"parameter {name} is on the meta device; call model.to_empty(device=...) first")
        parameter.copy_(initial_value(name, tuple(parameter.shape), config, seed))


_AHEAD = r"mtp_layers\.\d+\."
_LAYER = rf"(layers\.\d+\.|{_AHEAD}layer\.)"
_NORMS = rf"({_LAYER}((attention|mlp)(_output)?|attention\.[qk])|({_AHEAD})?final|{_AHEAD}(embedding|hidden))_norm"
_RULES: values.Rules = (
    (r"embedding\.tokens\.weight", values.vocabulary),
    (r"head\.weight", values.vocabulary),
    (r"embedding\.positions\.weight", values.matrix),
    (r"mtp_layers\.\d+\.projection\.weight", values.matrix),
    (rf"{_LAYER}attention\.w[qkv]\.weight", values.query_key_value),
    (rf"{_LAYER}attention\.relative\.projection", values.matrix),
    (rf"{_LAYER}attention\.relative\.(content|distance)_bias", values.normal),
    (rf"{_LAYER}mlp\.w_(gate|up)\.weight", values.gate_up),
    (rf"{_LAYER}(attention\.wo|mlp\.w_down)\.weight", values.output_projection),
    (rf"{_LAYER}(attention\.w[qkvo]|mlp\.w_(gate|up|down))\.bias", values.zeros),
    (rf"{_NORMS}\.weight", values.norm_weight),
    (rf"{_NORMS}\.bias", values.zeros),
)
