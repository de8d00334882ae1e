"""Initial values of ELECTRA, parameter by parameter: those of an encoder, in each network by its own sizes."""

from torch import Tensor

from megalm.config.generator import generator_of
from megalm.config.model import ModelConfig
from megalm.models.bert.init import RULES
from megalm.models.blocks import initial_values as values

_OWN: values.Rules = (
    (r"(generator\.)?projection\.weight", values.matrix),
    (r"(generator\.)?projection\.bias", values.zeros),
    (r"detector\.(dense|classifier)\.weight", values.matrix),
    (r"detector\.(dense|classifier)\.bias", values.zeros),
)
_RULES: values.Rules = (*((rf"(generator\.)?({pattern})", rule) for pattern, rule in RULES), *_OWN)


def initial_value(name: str, shape: values.Shape, config: ModelConfig, seed: int) -> Tensor:
    """The whole initial tensor of parameter `name`, float32 on CPU: a pure function of its arguments.

    As of `models.bert`; the parameters of the generator by its configuration.
    """
    own = generator_of(config) if is_of_generator(name, config) else config
    return values.value_by_rules(_RULES, "megalm/models/electra/init.py", name, shape, own, seed)


def is_of_generator(name: str, config: ModelConfig) -> bool:
    """Whether a parameter is the generator's alone."""
    first, _, rest = name.partition(".")
    return first == "generator" or (first == "layers" and int(rest.partition(".")[0]) < config.generator_layers)
