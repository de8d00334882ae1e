"""Masked language modelling (BERT, RoBERTa): some tokens are hidden, and the model tells what they were.

Shapes: T sequence, N = T + 1 room for cumulative text lengths, L tokens of the row that are no padding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from megalm.config.sections import RunConfig
from megalm.config.spans import MaskedRuns
from megalm.errors import ConfigError
from megalm.objectives.base import Documents, Example, Field, Sample, Statistics, filled
from megalm.objectives.causal import document_starts
from megalm.randomness import stable_seed

Tokens = npt.NDArray[np.int64]
STANDS_IN = {"mask": ("mask",), "cls": ("cls", "bos"), "sep": ("sep", "eos", "eod")}
"""Token of the objective -> the tokenizer's special tokens that it may be, the first that there is."""
_PAD = -1
_SINGLE = MaskedRuns(longest=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedObjective:
    """Turns tokens into [CLS] tokens [SEP], or with `is_pair` into [CLS] A [SEP] B [SEP], and hides some of them.

    `tokens` (int64 [T]) is what the model sees, `labels` (int64 [T]) what stood there, `loss_mask` (float32 [T]) 1
    where a token is hidden. Hidden are `mask_prob` of the tokens, exact in expectation, special ones never; with
    `word_starts` (which tokens begin a word, by id) whole words at a time, and as long runs of them as `runs` says,
    with one at least between two of them. `cu_seqlens` (int32 [N]) ends the text before its padding, and with
    `reset_attention_mask` each document, which ends with `eod`; with `reset_position_ids` `position_ids` (int64 [T])
    count from 0 in each.
    A and B are neighbours, in half of the pairs exchanged, or with `next_text` B of another document: `is_random`
    (int64 []) is then 1, and -1 where there is no pair; `token_types` (int64 [T]) are 1 from B on. `short_seq_prob` of
    the pairs are cut to a random length.
    Everything drawn follows from the seed and the sample's number.
    Sources: Devlin et al. 2019, arXiv:1810.04805, section 3.1 and appendix A; full rows: Liu et al. 2019 (RoBERTa),
    arXiv:1907.11692, section 4; exchanged texts: Lan et al. 2019 (ALBERT), arXiv:1909.11942, section 3.1.
    """

    special_tokens: ClassVar[tuple[str, ...]] = ("mask", "cls", "bos", "sep", "eos", "eod", "pad")
    shared_tokens: ClassVar[int] = 0
    name: ClassVar[str] = "masked"
    """As --objective has it."""
    masked_share: ClassVar[float] = 0.8
    replaced_share: ClassVar[float] = 0.1
    """Of the hidden tokens, those that become the mask, and those that become a random token; the rest stay."""

    seed: int
    vocab_size: int
    mask: int
    cls: int
    sep: int
    special: tuple[int, ...]
    """Ids that are neither hidden nor put in the place of others, ascending."""
    pad: int = 0
    eod: int | None = None
    mask_prob: float = 0.15
    is_pair: bool = False
    short_seq_prob: float = 0.0
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    word_starts: npt.NDArray[np.bool_] | None = None
    runs: MaskedRuns = _SINGLE
    next_text: bool = False
    documents: Documents | None = None
    """Where the next texts are from."""

    def __post_init__(self) -> None:
        for option in ("reset_position_ids", "reset_attention_mask"):
            if getattr(self, option) and self.eod is None:
                flag = "--" + option.replace("_", "-")
                raise ConfigError(f"{option} needs a tokenizer with an end-of-document token; drop {flag}")

    @classmethod
    def build(cls, config: RunConfig, special: Mapping[str, int | None]) -> Self:
        """The objective that the run's flags ask for.

        Raises:
            ConfigError: no token to hide others behind, to begin or to end a text.
        """
        data, vocab_size = config.data, config.model.vocab_size
        assert vocab_size is not None, "complete_model fills it in"
        found = {name: _first(special, names) for name, names in STANDS_IN.items()}
        missing = [name for name, number in found.items() if number is None]
        if missing:
            raise ConfigError(
                f"objective={cls.name} needs a tokenizer with {' and '.join(f'a {name} token' for name in missing)}; "
                "give one that has it (--tokenizer-model), or for a sentencepiece .model "
                "--tokenizer-type SentencePieceTokenizer, which adds it, and preprocess the data with that"
            )
        return cls(
            mask=found["mask"] or 0,
            cls=found["cls"] or 0,
            sep=found["sep"] or 0,
            special=tuple(sorted({number for number in special.values() if number is not None})),
            seed=config.training.seed,
            vocab_size=vocab_size,
            pad=special["pad"] or 0,
            eod=special["eod"],
            mask_prob=data.mask_prob,
            is_pair=config.model.has_sentence_head,
            short_seq_prob=data.short_seq_prob,
            reset_position_ids=data.reset_position_ids,
            reset_attention_mask=data.reset_attention_mask,
            runs=MaskedRuns.of(data),
            next_text=data.bert_sentence_head == "nsp" and config.model.has_sentence_head,
        )

    @property
    def needs_documents(self) -> bool:
        """Whether it looks at other documents than a sample's."""
        return self.next_text

    def with_documents(self, documents: Documents) -> Self:
        """The objective that takes them from there."""
        return replace(self, documents=documents)

    def with_words(self, starts: Sequence[bool]) -> Self:
        """The same, hiding whole words; `starts` says of each id whether it begins one."""
        known = np.zeros(self.vocab_size, dtype=np.bool_)
        known[: len(starts)] = starts
        return replace(self, word_starts=known)

    def sample_tokens(self, seq_length: int) -> int:
        """What is left beside the tokens around texts."""
        return seq_length - self._around

    def fields(self, seq_length: int) -> Mapping[str, Field]:
        """The fields of every example, in their order."""
        found = {
            "tokens": Field((seq_length,), np.int64),
            "labels": Field((seq_length,), np.int64),
            "loss_mask": Field((seq_length,), np.float32),
            "cu_seqlens": Field((seq_length + 1,), np.int32),
        }
        if self.is_pair:
            found["token_types"] = Field((seq_length,), np.int64)
            found["is_random"] = Field((), np.int64)
        if self.reset_position_ids:
            found["position_ids"] = Field((seq_length,), np.int64)
        return found

    def __call__(self, sample: Sample) -> Example:
        """The arrays of one batch row."""
        draw = np.random.default_rng(stable_seed(self.seed, "masked", sample.number))
        real = sample.tokens[sample.tokens != _PAD]
        T = len(sample.tokens) + self._around
        parts, is_random = self._pair(sample, real, draw) if self.is_pair else ([real], -1)
        text = np.concatenate([[self.cls], *(np.append(part, self.sep) for part in parts)]) if len(real) else real
        hidden, units = self._hidden(text, draw)
        shown = text.copy()
        shown[hidden] = self._shown(text[hidden], units, draw)
        row: Example = {
            "tokens": filled(shown, T, self.pad),
            "labels": filled(text, T, self.pad),
            "loss_mask": filled(hidden.astype(np.float32), T, 0.0),
        }
        if self.is_pair:
            second = np.arange(T) >= len(parts[0]) + 2
            row["token_types"] = (second & (np.arange(T) < len(text))).astype(np.int64)
            row["is_random"] = np.asarray(is_random, dtype=np.int64)
        return row | self._texts(text, T)

    def statistics(self, batch: Mapping[str, npt.NDArray[Any]]) -> Statistics:
        """Share of the tokens that are hidden, mean run of hidden ones, share of padding, of texts out of place."""
        hidden, labels = batch["loss_mask"] > 0, batch["labels"]
        runs = np.count_nonzero(hidden[:, 0]) + np.count_nonzero(hidden[:, 1:] & ~hidden[:, :-1])
        is_end, T = labels[:, ::-1] == self.sep, labels.shape[1]  # the last one ends the text
        lengths = np.where(is_end.any(axis=1), T - is_end.argmax(axis=1), 0)
        is_real = np.arange(T) < lengths[:, None]
        count = float(np.count_nonzero(hidden))
        found: dict[str, tuple[float, float]] = {
            "mask_rate": (count, float(np.count_nonzero(self._is_ordinary[labels] & is_real))),
            "mean_span": (count, float(runs)),
            "padding_share": (float(np.count_nonzero(~is_real)), labels.size),
        }
        if self.is_pair:
            pairs = batch["is_random"]
            found["random_share"] = (float(np.count_nonzero(pairs == 1)), float(np.count_nonzero(pairs >= 0)))
        return found

    @cached_property
    def _is_ordinary(self) -> npt.NDArray[np.bool_]:
        """Of each id, whether it may be hidden and stand in the place of others."""
        table = np.ones(self.vocab_size, dtype=np.bool_)
        table[list(self.special)] = False
        return table

    @cached_property
    def _ordinary(self) -> Tokens:
        return np.flatnonzero(self._is_ordinary)

    @property
    def _around(self) -> int:
        return 3 if self.is_pair else 2

    def _pair(self, sample: Sample, real: Tokens, draw: np.random.Generator) -> tuple[list[Tokens], int]:
        """Two texts, and 1 if the second does not follow the first; what cannot be cut is one text, and -1."""
        if len(real) > 2 and draw.random() < self.short_seq_prob:
            real = real[: draw.integers(2, len(real))]
        cuts = np.arange(1, len(real))
        if self.word_starts is not None and self.word_starts[real[1:]].any():
            cuts = cuts[self.word_starts[real[1:]]]
        if self.next_text and self.eod is not None:  # what follows a document is another one
            cuts = cuts[real[cuts - 1] != self.eod]
        if not len(cuts):
            return [real], -1
        cut, is_random = int(draw.choice(cuts)), int(draw.random() < 0.5)
        parts = [real[:cut], real[cut:]]
        if not is_random:
            return parts, 0
        if not self.next_text:
            return parts[::-1], 1
        assert self.documents is not None, "the run's data gives them"
        return [parts[0], self.documents.other_text(sample.number, len(parts[1]), draw)], 1

    def _hidden(self, text: Tokens, draw: np.random.Generator) -> tuple[npt.NDArray[np.bool_], Tokens]:
        """Which tokens are hidden, bool [L], and which unit (token or run) each of these belongs to.

        They are `mask_prob` of those that are not special, in expectation exactly.
        """
        hidden = self._is_ordinary[text]
        places = np.flatnonzero(hidden)
        if not len(places):
            return hidden, places
        starts = np.ones(len(places), dtype=np.bool_)
        if self.word_starts is not None:  # what follows a special token begins a word too
            starts[1:] = self.word_starts[text[places[1:]]] | (np.diff(places) > 1)
        words = np.cumsum(starts) - 1
        if self.runs.longest == 1:
            hidden[places] = self._single_words(words, draw)[words]
            return hidden, np.arange(np.count_nonzero(hidden))
        run_of_word = hidden_runs(int(words[-1]) + 1, self.mask_prob, self.runs, draw)
        run_of_token = run_of_word[words]
        hidden[places] = run_of_token >= 0
        if self.runs.shape == "geometric":
            return hidden, run_of_token[run_of_token >= 0]
        return hidden, np.arange(np.count_nonzero(hidden))

    def _single_words(self, words: Tokens, draw: np.random.Generator) -> npt.NDArray[np.bool_]:
        """Which words are hidden: in random order as many as fit, and the next with the probability that is left."""
        order = draw.permutation(words[-1] + 1)
        ends, wanted = np.cumsum(np.bincount(words)[order]), self.mask_prob * len(words)
        whole = int(np.searchsorted(ends, wanted, side="right"))
        before = ends[whole - 1] if whole else 0
        chosen = whole + int(draw.random() * (ends[whole] - before) < wanted - before)
        is_chosen = np.zeros(len(order), dtype=np.bool_)
        is_chosen[order[:chosen]] = True
        return is_chosen

    def _shown(self, tokens: Tokens, units: Tokens, draw: np.random.Generator) -> Tokens:
        """What stands in the place of hidden tokens, one kind for all of a unit."""
        kind = draw.random(int(units.max(initial=-1)) + 1)[units]
        other = self._ordinary[draw.integers(0, len(self._ordinary), len(tokens))]
        shown = np.where(kind < self.masked_share + self.replaced_share, other, tokens)
        return np.where(kind < self.masked_share, self.mask, shown)

    def _texts(self, text: Tokens, T: int) -> Example:
        """Where texts begin and end in the row."""
        assert self.eod is not None or not self.reset_attention_mask, "checked when the objective is built"
        resets = self.reset_attention_mask or self.reset_position_ids
        starts = document_starts(text, self.eod) if resets and self.eod is not None and len(text) else np.array([0])
        edges = np.append(starts, len(text))
        found: Example = {"cu_seqlens": np.full(T + 1, T, dtype=np.int32)}
        inner = edges if self.reset_attention_mask else edges[[0, -1]]
        found["cu_seqlens"][: len(inner)] = inner
        if self.reset_position_ids:
            found["position_ids"] = np.arange(T) - np.repeat(edges, np.diff(np.append(edges, T)))
        return found


def hidden_runs(words: int, rate: float, runs: MaskedRuns, draw: np.random.Generator) -> Tokens:
    """Of so many words, the number of the run that each is hidden in, int64 [words], -1 for those that stay.

    As many runs as make `rate` of the words in the mean, of lengths drawn from `runs`, so that both means are exact; in
    any order of runs and words that leaves one between two runs, all as likely. What finds no room is left out.
    """
    found, wanted = np.full(words, -1, dtype=np.int64), rate * words / runs.mean
    count = int(wanted) + int(draw.random() < wanted % 1)
    lengths = np.searchsorted(np.cumsum(runs.probabilities)[:-1], draw.random(count), side="right") + 1
    ends = lengths.cumsum()
    count = int(np.searchsorted(ends + np.arange(count), words, side="right"))
    if not count:
        return found
    lengths, hidden = lengths[:count], int(ends[count - 1])
    free = words - hidden - (count - 1)
    before = np.sort(draw.permutation(free + count)[:count])  # words that stay and runs before it
    starts = before + ends[:count] - lengths
    found[np.repeat(starts - (ends[:count] - lengths), lengths) + np.arange(hidden)] = np.repeat(
        np.arange(count), lengths
    )
    return found


def _first(special: Mapping[str, int | None], names: Sequence[str]) -> int | None:
    return next((special[name] for name in names if special[name] is not None), None)
