"""Decoder-only models, from GPT-2 to Gemma 3: the model, its initial values, its FLOPs, its names in transformers."""

from megalm.models.blocks.embedding import tied_tables
from megalm.models.contract import Family
from megalm.models.gpt.flops import num_parameters, part_costs, training_flops_per_token
from megalm.models.gpt.hugging_face import NAMES
from megalm.models.gpt.init import initial_value
from megalm.models.gpt.model import GPT

GPT_FAMILY = Family(
    build=GPT,
    initial_value=initial_value,
    num_parameters=lambda config: num_parameters(config).total,
    training_flops_per_token=training_flops_per_token,
    part_costs=part_costs,
    shared_parameters=tied_tables,
    hugging_face=NAMES,
)
