"""Encoder-only models, from BERT to ModernBERT: the model, its initial values, its FLOPs, its names in transformers."""

from megalm.models.bert.flops import num_parameters, part_costs, training_flops_per_token
from megalm.models.bert.hugging_face import NAMES
from megalm.models.bert.init import initial_value
from megalm.models.bert.model import Bert
from megalm.models.blocks.embedding import tied_tables
from megalm.models.contract import Family

BERT_FAMILY = Family(
    build=Bert,
    initial_value=initial_value,
    num_parameters=num_parameters,
    training_flops_per_token=training_flops_per_token,
    part_costs=part_costs,
    shared_parameters=tied_tables,
    hugging_face=NAMES,
)
