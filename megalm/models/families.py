"""The model families: `model_family` names one."""

from megalm.models.bert import BERT_FAMILY
from megalm.models.contract import Family
from megalm.models.electra import ELECTRA_FAMILY
from megalm.models.gpt import GPT_FAMILY
from megalm.models.t5 import T5_FAMILY
from megalm.tables import Table

FAMILIES: Table[Family] = Table(
    "model_family", {"gpt": GPT_FAMILY, "bert": BERT_FAMILY, "electra": ELECTRA_FAMILY, "t5": T5_FAMILY}
)
"""To add one: a folder here whose model keeps to `contract.LanguageModel`, a file in `parallel/plans/`, a line in both
tables."""
