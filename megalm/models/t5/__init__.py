"""Encoder-decoder models, T5 to mT5: the model, its initial values, its FLOPs, its names in transformers."""

from megalm.models.blocks.embedding import tied_tables
from megalm.models.contract import Family
from megalm.models.t5.flops import num_parameters, part_costs, training_flops_per_token
from megalm.models.t5.hugging_face import NAMES
from megalm.models.t5.init import initial_value
from megalm.models.t5.model import T5

T5_FAMILY = Family(
    build=T5,
    initial_value=initial_value,
    num_parameters=num_parameters,
    training_flops_per_token=training_flops_per_token,
    part_costs=part_costs,
    shared_parameters=tied_tables,
    hugging_face=NAMES,
)
