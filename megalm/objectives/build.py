"""The objectives by name, and the one of a run."""

from typing import Protocol

from megalm.config import RunConfig
from megalm.objectives.base import Objective
from megalm.objectives.causal import CausalObjective
from megalm.objectives.span import SpanObjective
from megalm.tables import Table

OBJECTIVES: Table[type[Objective]] = Table("objective", {"causal": CausalObjective, "span": SpanObjective})
"""Value of --objective -> the objective, made by its `build`."""


class HasSpecialTokens(Protocol):
    """A tokenizer, as far as objectives see it."""

    def special(self, name: str) -> int | None:
        """The id of a special token; None if there is none."""


def build_objective(config: RunConfig, tokenizer: HasSpecialTokens | None) -> Objective:
    """The objective of --objective, with the ids of the special tokens that it names.

    Raises:
        ConfigError: there is none of this name, or as its `build`.
    """
    kind = OBJECTIVES[config.training.objective]
    return kind.build(config, {name: tokenizer.special(name) if tokenizer else None for name in kind.special_tokens})
