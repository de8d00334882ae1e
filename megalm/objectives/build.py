"""The objectives by name, and the one of a run."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self, runtime_checkable

from megalm.config.sections import RunConfig
from megalm.errors import ConfigError
from megalm.objectives.base import Objective, Transform
from megalm.objectives.causal import CausalObjective
from megalm.objectives.fim import FimObjective
from megalm.objectives.masked import MaskedObjective
from megalm.objectives.mixture import MixtureObjective
from megalm.objectives.prefix import PrefixObjective
from megalm.objectives.replaced import ReplacedObjective
from megalm.objectives.span import SpanObjective
from megalm.objectives.ul2 import Ul2Objective
from megalm.tables import Table

OBJECTIVES: Table[type[Objective]] = Table(
    "objective",
    {
        "causal": CausalObjective,
        "prefix": PrefixObjective,
        "fim": FimObjective,
        "masked": MaskedObjective,
        "rtd": ReplacedObjective,
        "span": SpanObjective,
        "ul2": Ul2Objective,
    },
)
"""Value of --objective -> the objective, made by its `build`."""


class Vocabulary(Protocol):
    """A tokenizer, as far as objectives see it."""

    def special(self, name: str) -> int | None:
        """The id of a special token; None if there is none."""

    def token_id(self, token: str) -> int | None:
        """The id of a token by its spelling; None if there is none."""

    def word_starts(self) -> Sequence[bool] | None:
        """Whether a token begins a word, by id; None: the tokenizer does not know."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    def encode(self, text: str) -> Sequence[int]:
        """The ids of one text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens give none."""


@runtime_checkable
class UsesWords(Protocol):
    """An objective that may take whole words."""

    def with_words(self, starts: Sequence[bool]) -> Self:
        """The objective that does; `starts` as a vocabulary's `word_starts`."""


@runtime_checkable
class NamesTokens(Protocol):
    """A kind of objective some of whose special tokens may be named in settings."""

    @classmethod
    def token_settings(cls) -> Mapping[str, str]:
        """Special token -> the setting of DataConfig that spells it."""


@runtime_checkable
class UsesText(Protocol):
    """An objective that may look at the text of its tokens."""

    @property
    def needs_text(self) -> bool:
        """Whether it does."""

    def with_text(self, vocabulary: Any) -> Self:
        """The objective that has what tells it."""


def build_objective(config: RunConfig, tokenizer: Vocabulary | None) -> Transform:
    """The objective of --objective, or of --objective-mixture.

    Raises:
        ConfigError: there is none of this name, or as its `build`; the tokenizer knows no words, or does not cut texts;
            the objectives of a mixture do not go together.
    """
    weights = config.training.objectives
    members = {name: _built(name, config, tokenizer) for name in weights}
    if len(members) == 1:
        return next(iter(members.values()))
    return MixtureObjective.of(members, weights, config.batch.seq_length)


def _built(name: str, config: RunConfig, tokenizer: Vocabulary | None) -> Transform:
    """One objective, with the ids of the special tokens that it names, and words and texts if it is to see them."""
    kind = OBJECTIVES[name]
    objective = kind.build(config, _special(kind, config, tokenizer))
    if isinstance(objective, UsesText) and objective.needs_text:
        if tokenizer is None:
            raise ConfigError("fim_unit=character and fim_no_prefix need a tokenizer; give --tokenizer-model")
        objective = objective.with_text(tokenizer)
    if not config.data.whole_word_masking or not isinstance(objective, UsesWords):
        return objective
    starts = tokenizer.word_starts() if tokenizer else None
    if starts is None:
        raise ConfigError(
            f"whole_word_masking=true: {type(tokenizer).__name__} does not tell which tokens begin a word; drop it"
        )
    return objective.with_words(starts)


def _special(kind: type[Objective], config: RunConfig, tokenizer: Vocabulary | None) -> dict[str, int | None]:
    """The ids of what `kind` asks for: of the token that a setting spells, else of what the tokenizer has by name."""
    found = {name: tokenizer.special(name) if tokenizer else None for name in kind.special_tokens}
    settings: Mapping[str, str] = kind.token_settings() if isinstance(kind, NamesTokens) else {}
    for name, setting in settings.items():
        token = getattr(config.data, setting)
        if token is None:
            continue
        found[name] = tokenizer.token_id(token) if tokenizer else None
        if found[name] is None:
            raise ConfigError(
                f'{setting}="{token}" is no token of the tokenizer; give one that is, or leave out '
                f"--{setting.replace('_', '-')}"
            )
    return found
