"""The objectives by name, and the one of a run."""

from collections.abc import Sequence
from typing import Protocol, Self, runtime_checkable

from megalm.config import RunConfig
from megalm.errors import ConfigError
from megalm.objectives.base import Objective
from megalm.objectives.causal import CausalObjective
from megalm.objectives.masked import MaskedObjective
from megalm.objectives.prefix import PrefixObjective
from megalm.objectives.span import SpanObjective
from megalm.tables import Table

OBJECTIVES: Table[type[Objective]] = Table(
    "objective",
    {"causal": CausalObjective, "prefix": PrefixObjective, "masked": MaskedObjective, "span": SpanObjective},
)
"""Value of --objective -> the objective, made by its `build`."""


class Vocabulary(Protocol):
    """A tokenizer, as far as objectives see it."""

    def special(self, name: str) -> int | None:
        """The id of a special token; None if there is none."""

    def word_starts(self) -> Sequence[bool] | None:
        """Whether a token begins a word, by id; None: the tokenizer does not know."""


@runtime_checkable
class UsesWords(Protocol):
    """An objective that may take whole words."""

    def with_words(self, starts: Sequence[bool]) -> Self:
        """The objective that does; `starts` as a vocabulary's `word_starts`."""


def build_objective(config: RunConfig, tokenizer: Vocabulary | None) -> Objective:
    """The objective of --objective, with the ids of the special tokens that it names, and words if it is to take them.

    Raises:
        ConfigError: there is none of this name, or as its `build`; the tokenizer knows no words.
    """
    kind = OBJECTIVES[config.training.objective]
    special = {name: tokenizer.special(name) if tokenizer else None for name in kind.special_tokens}
    objective = kind.build(config, special)
    if not config.data.whole_word_masking or not isinstance(objective, UsesWords):
        return objective
    starts = tokenizer.word_starts() if tokenizer else None
    if starts is None:
        raise ConfigError(
            f"whole_word_masking=true: {type(tokenizer).__name__} does not tell which tokens begin a word; drop it"
        )
    return objective.with_words(starts)
