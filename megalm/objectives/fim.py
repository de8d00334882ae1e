"""Fill in the middle: a document's middle stands at its end, so that a causal model learns to write it from both sides.

A document `prefix middle suffix` becomes, with P, S and M the tokens before its parts,

    P prefix S suffix M middle      (PSM)
    P S suffix M prefix middle      (SPM, in which prefix and middle stay together)

Source: Bavarian et al. 2022, arXiv:2207.14255, section 3; SPM is its second variant, as in Megatron-LM's GPTFIMDataset.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt

from megalm.config.sections import RunConfig
from megalm.errors import ConfigError, MegalmError
from megalm.objectives.base import Example, Field, Sample, Statistics
from megalm.objectives.causal import CausalObjective
from megalm.randomness import stable_seed

Ids = npt.NDArray[np.int64]
_PARTS = ("prefix", "middle", "suffix")


class Vocabulary(Protocol):
    """A tokenizer, as far as texts are cut by it."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    def encode(self, text: str) -> Sequence[int]:
        """The ids of one text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cutter:
    """Cuts tokens in two: between two of them, or with a `vocabulary` at a character, so that one becomes two or more.

    A token whose own text is no text (a part of a character), or whose halves give another one, is not cut.
    """

    vocabulary: Vocabulary | None = None

    @cached_property
    def _characters(self) -> Ids | None:
        """Characters of each id."""
        if self.vocabulary is None:
            return None
        decode = self.vocabulary.decode
        return np.array([len(decode([number])) for number in range(self.vocabulary.vocab_size)], dtype=np.int64)

    def size(self, tokens: Ids) -> int:
        """How many places there are to cut at, less one."""
        return len(tokens) if self._characters is None else int(self._characters[tokens].sum())

    def cut(self, tokens: Ids, place: int) -> tuple[Ids, Ids]:
        """The tokens before `place`, and those from it on."""
        if self._characters is None or self.vocabulary is None:
            return tokens[:place], tokens[place:]
        ends = self._characters[tokens].cumsum()
        number = int(ends.searchsorted(place, side="right"))
        inside = place - (int(ends[number - 1]) if number else 0)
        if inside == 0:
            return tokens[:number], tokens[number:]
        text = self.vocabulary.decode([int(tokens[number])])
        left, right = (self.vocabulary.encode(half) for half in (text[:inside], text[inside:]))
        if "\ufffd" in text or self.vocabulary.decode([*left, *right]) != text:
            return tokens[:number], tokens[number:]
        return (
            np.append(tokens[:number], np.asarray(left, dtype=np.int64)),
            np.concatenate((np.asarray(right, dtype=np.int64), tokens[number + 1 :])),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class FimObjective:
    """The arrays of `causal` of a sample in which `rate` of the documents have their middle at the end.

    Both cuts are drawn from all places of a document, so each part may be empty. `spm_rate` of them are SPM. With
    `split` a document is parted by that token; then `rate` of the documents are taken and of each `fragment_rate` of
    its fragments. What begins with `no_prefix` stays. The sample keeps its length: three tokens more for each document
    push as many out at its end.
    """

    special_tokens: ClassVar[tuple[str, ...]] = ("eod", "fim_prefix", "fim_middle", "fim_suffix")
    shared_tokens: ClassVar[int] = CausalObjective.shared_tokens

    causal: CausalObjective
    seed: int
    prefix: int
    middle: int
    suffix: int
    rate: float = 0.5
    spm_rate: float = 0.5
    split: int | None = None
    fragment_rate: float = 0.5
    no_prefix: str | None = None
    unit: str = "token"
    cutter: Cutter = Cutter()
    text: Vocabulary | None = None
    """What tells whether a text begins with `no_prefix`."""

    @classmethod
    def token_settings(cls) -> Mapping[str, str]:
        """The settings that spell its tokens."""
        return {f"fim_{part}": f"fim_{part}_token" for part in _PARTS} | {"fim_split": "fim_split_sample"}

    @classmethod
    def build(cls, config: RunConfig, special: Mapping[str, int | None]) -> Self:
        """The objective that the run's flags ask for.

        Raises:
            ConfigError: a token around the parts is missing.
        """
        data = config.data
        found = {part: special[f"fim_{part}"] for part in _PARTS}
        missing = [f"<fim_{part}>" for part, number in found.items() if number is None]
        if missing:
            raise ConfigError(
                f"objective=fim needs a tokenizer with {', '.join(missing)}; name its own tokens with "
                "--fim-prefix-token, --fim-middle-token and --fim-suffix-token, or add some: --vocab-extra-ids 100"
            )
        return cls(
            causal=CausalObjective.build(config, special),
            seed=config.training.seed,
            prefix=found["prefix"] or 0,
            middle=found["middle"] or 0,
            suffix=found["suffix"] or 0,
            rate=data.fim_rate,
            spm_rate=data.fim_spm_rate,
            split=special.get("fim_split"),
            fragment_rate=data.fim_fragment_rate,
            no_prefix=data.fim_no_prefix,
            unit=data.fim_unit,
        )

    @property
    def needs_text(self) -> bool:
        """Whether it looks at the text of tokens."""
        return self.unit == "character" or self.no_prefix is not None

    def with_text(self, vocabulary: Vocabulary) -> Self:
        """The objective that has what tells it.

        Raises:
            ConfigError: it cannot cut texts.
        """
        if self.unit == "character" and not _cuts_texts(vocabulary):
            raise ConfigError(
                f"fim_unit=character: two texts of {type(vocabulary).__name__} end to end are not their tokens end to "
                "end (it puts a blank before each); use --fim-unit token"
            )
        cutter = Cutter(vocabulary=vocabulary) if self.unit == "character" else Cutter()
        return replace(self, cutter=cutter, text=vocabulary)

    def sample_tokens(self, seq_length: int) -> int:
        """The input, and one token more: the last label."""
        return self.causal.sample_tokens(seq_length)

    def fields(self, seq_length: int) -> Mapping[str, Field]:
        """The fields of every example, in their order."""
        return self.causal.fields(seq_length)

    def __call__(self, sample: Sample) -> Example:
        """The arrays of one batch row."""
        draw = np.random.default_rng(stable_seed(self.seed, "fim", sample.number))
        pad, length = self.causal.pad, len(sample.tokens)
        moved = np.concatenate([*self._moved(sample.tokens[sample.tokens != pad], draw), np.full(length, pad)])
        return self.causal(_Moved(sample.number, sample.dataset, moved[:length]))

    def statistics(self, batch: Mapping[str, npt.NDArray[Any]]) -> Statistics:
        """Share of the documents that have a part moved, about: a document goes on in the next row."""
        tokens, eod = batch["tokens"], self.causal.eod
        documents = len(tokens) + (0 if eod is None else int(np.count_nonzero(tokens[:, :-1] == eod)))
        return {"fim_rate": (int(np.count_nonzero(tokens == self.prefix)), documents)}

    def _moved(self, tokens: Ids, draw: np.random.Generator) -> Iterator[Ids]:
        """The documents of a sample, each with its end of document."""
        for document, end in _parted(tokens, self.causal.eod):
            if self.split is None or not (document == self.split).any():
                yield self._permuted(document, draw) if self._is_taken(document, self.rate, draw) else document
            elif draw.random() < self.rate:
                for fragment, split in _parted(document, self.split):
                    taken = self._is_taken(fragment, self.fragment_rate, draw)
                    yield self._permuted(fragment, draw) if taken else fragment
                    yield split
            else:
                yield document
            yield end

    def _is_taken(self, tokens: Ids, rate: float, draw: np.random.Generator) -> bool:
        if not len(tokens) or draw.random() >= rate:
            return False
        if self.no_prefix is None:
            return True
        assert self.text is not None, "build_objective gives it"
        first = self.text.decode(tokens[: 4 * len(self.no_prefix)].tolist())  # a character has at most four bytes
        return not first.startswith(self.no_prefix)

    def _permuted(self, tokens: Ids, draw: np.random.Generator) -> Ids:
        first, second = sorted(draw.integers(0, self.cutter.size(tokens), 2, endpoint=True).tolist())
        before, suffix = self.cutter.cut(tokens, second)
        prefix, middle = self.cutter.cut(before, first)
        P, M, S = [self.prefix], [self.middle], [self.suffix]
        if draw.random() < self.spm_rate:
            return np.concatenate((P, S, suffix, M, prefix, middle))
        return np.concatenate((P, prefix, S, suffix, M, middle))


@dataclass(frozen=True, slots=True, eq=False)
class _Moved:
    """A sample with other tokens."""

    number: int
    dataset: int
    tokens: Ids


def _parted(tokens: Ids, end: int | None) -> Iterator[tuple[Ids, Ids]]:
    """What lies between the tokens `end`, each with the one after it, if there is one."""
    start = 0
    for place in () if end is None else np.flatnonzero(tokens == end).tolist():
        yield tokens[start:place], tokens[place : place + 1]
        start = place + 1
    yield tokens[start:], tokens[:0]


def _cuts_texts(vocabulary: Vocabulary) -> bool:
    try:
        return vocabulary.decode([*vocabulary.encode("a"), *vocabulary.encode("b")]) == "ab"
    except MegalmError:
        return False
