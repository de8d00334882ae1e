"""ELECTRA, generator and discriminator: the model, its initial values, its FLOPs, its parts in transformers."""

from megalm.models.contract import Family
from megalm.models.electra.flops import num_parameters, part_costs, training_flops_per_token
from megalm.models.electra.hugging_face import NAMES, part
from megalm.models.electra.init import initial_value
from megalm.models.electra.model import Electra

ELECTRA_FAMILY = Family(
    build=Electra,
    initial_value=initial_value,
    num_parameters=num_parameters,
    training_flops_per_token=training_flops_per_token,
    part_costs=part_costs,
    shared_parameters=lambda _config: (),
    hugging_face=NAMES,
    part=part,
)
