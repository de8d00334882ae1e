"""What a model is trained to predict: an objective turns a numbered sample into the arrays of one batch row.

To add one: a file here (or a module of --import-module) with a frozen dataclass that is an `Objective` (see base.py),
and its entry in `OBJECTIVES`; `--objective NAME` then chooses it. It is pure, so its result depends on its fields and
on the sample only: what it draws, it draws from `stable_seed(self.seed, "its purpose", sample.number)`, with the run's
seed as a field. It is picklable, since loader workers call it. What only some need, they say by a method more: tokens
that settings spell (`NamesTokens`), words (`UsesWords`), texts (`UsesText`), other documents (`UsesDocuments`), what
they count of their batches (`HasStatistics`).
"""

from megalm.objectives.base import Example, Field, Objective, Sample
from megalm.objectives.build import OBJECTIVES, build_objective

__all__ = ["OBJECTIVES", "Example", "Field", "Objective", "Sample", "build_objective"]
