"""Sharding plans, one file a model family: which layer gets which parallel style, by name."""

from megalm.parallel.plans.bert import BERT_PLAN
from megalm.parallel.plans.electra import ELECTRA_PLAN
from megalm.parallel.plans.gpt import GPT_PLAN
from megalm.parallel.plans.t5 import T5_PLAN
from megalm.parallel.styles import ShardingPlan
from megalm.tables import Table

PLANS: Table[ShardingPlan] = Table(
    "model_family", {"gpt": GPT_PLAN, "bert": BERT_PLAN, "electra": ELECTRA_PLAN, "t5": T5_PLAN}
)
"""By the names of `models.families.FAMILIES`."""
