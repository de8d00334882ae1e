"""T5's span corruption: the encoder reads a text with holes, the decoder writes what stood in them.

Of a text `a b c d e f g` with the spans `b c` and `f`, S the sentinels and E the end: the encoder reads
`a S0 d e S1 g E`, the labels are `S0 b c S1 f E`, and the decoder reads the labels moved on by one, from a start token.
Source: Raffel et al. 2020, arXiv:1910.10683, section 3.1.4; `random_spans_noise_mask` of T5's own code.

Shapes: N tokens of a text.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from megalm.config.noise import SpanNoise
from megalm.config.sections import RunConfig
from megalm.config.spans import SENTINELS, Denoising, SequenceIds, decoder_seq_length, denoisings
from megalm.errors import ConfigError
from megalm.objectives.base import Example, Field, Sample, Statistics
from megalm.objectives.forms import DecoderForm, EncoderDecoderForm, Form, Ids
from megalm.randomness import stable_seed


@dataclass(frozen=True, kw_only=True)
class DenoisingObjective(ABC):
    """Turns the tokens of a text [N] into a row of its form; N is the longest text of which that has room.

    What is made of it depends on the seed and the number of the sample alone.
    """

    shared_tokens: ClassVar[int] = 0
    purpose: ClassVar[str]
    """What its seeds are for."""

    kind: Denoising
    form: Form
    sentinels: tuple[int, ...]
    """At least one for each span of a whole text, in their order."""
    ids: SequenceIds
    seed: int

    @abstractmethod
    def sides(self, text: Ids, generator: np.random.Generator) -> tuple[Ids, Ids]:
        """What is read of a text, and what is written."""

    def sample_tokens(self, seq_length: int) -> int:
        """The longest text that there is room for, whatever is made of it."""
        return self.form.text_tokens(self.kind)

    def fields(self, seq_length: int) -> Mapping[str, Field]:
        """The fields of every example, in their order."""
        return self.form.fields()

    def __call__(self, sample: Sample) -> Example:
        """The arrays of one batch row."""
        text = sample.tokens[sample.tokens >= 0]  # padding is -1, at the end
        generator = np.random.default_rng(stable_seed(self.seed, self.purpose, sample.number))
        return self.form.row(*self.sides(text, generator), self.ids)


@dataclass(frozen=True, kw_only=True)
class SpanObjective(DenoisingObjective):
    """A whole text fills the encoder and the decoder."""

    special_tokens: ClassVar[tuple[str, ...]] = ("pad", "bos", "eos", "eod", *SENTINELS)
    purpose: ClassVar[str] = "span"

    @classmethod
    def build(cls, config: RunConfig, special: Mapping[str, int | None]) -> Self:
        """The objective that the run's settings ask for."""
        kind, form = denoisings(config)["span"], form_of(config)
        sentinels, ids = sentinels_and_ids("span", kind.spans(form.text_tokens(kind)), config, special)
        return cls(kind=kind, form=form, sentinels=sentinels, ids=ids, seed=config.training.seed)

    def sides(self, text: Ids, generator: np.random.Generator) -> tuple[Ids, Ids]:
        """The text with holes, and what stood in them."""
        return corrupted(text, self.kind.noises[0], self.sentinels, self.ids.end, generator)

    def statistics(self, batch: Mapping[str, npt.NDArray[Any]]) -> Statistics:
        """Share of the text that is noise, mean span, share of padding."""
        return self.form.statistics(batch, self.sentinels)


def form_of(config: RunConfig) -> Form:
    """That of the run's model."""
    decoder = decoder_seq_length(config)
    if decoder is None:
        return DecoderForm(length=config.batch.seq_length)
    return EncoderDecoderForm(encoder_length=config.batch.seq_length, decoder_length=decoder)


def corrupted(
    text: Ids, noise: SpanNoise, sentinels: Sequence[int], end: int, generator: np.random.Generator
) -> tuple[Ids, Ids]:
    """What is read of a text, and what is written. A single span is the end of the text."""
    hidden, spans = noise.counts(len(text))
    if spans == 0:
        return np.append(text, end), np.asarray([end])
    lengths = np.stack((_cut(len(text) - hidden, spans, generator), _cut(hidden, spans, generator)), axis=1)
    is_noise = np.repeat(np.tile([False, True], spans), lengths.flatten())
    starts = lengths.sum(axis=1).cumsum() - lengths[:, 1]
    used = np.asarray(sentinels[:spans])
    marked = text.copy()
    marked[starts] = used
    kept = ~is_noise
    kept[starts] = True
    written = np.insert(text[is_noise], lengths[:, 1].cumsum() - lengths[:, 1], used)
    return np.append(marked[kept], end), np.append(written, end)


def sentinels_and_ids(
    objective: str, spans: int, config: RunConfig, special: Mapping[str, int | None], taken: Sequence[int] = ()
) -> tuple[tuple[int, ...], SequenceIds]:
    """As many sentinels as texts may have `spans`, none of those that are `taken`, and the ids around sequences.

    Raises:
        ConfigError: there are too few.
    """
    if config.data.mock_data and not config.tokenizer.is_given:
        sentinels, ids = _of_generated_text(config.model.vocab_size or 0), SequenceIds(start=0, end=1, pad=0)
    else:
        sentinels, ids = _sentinels(special), SequenceIds.of(special)
    sentinels = tuple(number for number in sentinels if number not in taken)
    if len(sentinels) < spans:
        length, wanted = config.batch.seq_length, max(spans + len(taken), 100)
        raise ConfigError(
            f"objective={objective} needs {spans} sentinels <extra_id_0>, ... for seq_length={length}, and there are "
            f"{len(sentinels)}; give --vocab-extra-ids {wanted}, or a tokenizer that has them"
        )
    return sentinels[:spans], ids


def _cut(items: int, parts: int, generator: np.random.Generator) -> npt.NDArray[Any]:
    """The lengths of `parts` runs of at least one, `items` together; every way to cut is as likely."""
    edges = np.sort(generator.permutation(items - 1)[: parts - 1]) + 1
    return np.diff(edges, prepend=0, append=items)


def _sentinels(special: Mapping[str, int | None]) -> tuple[int, ...]:
    """Their ids, up to the first that there is not."""
    found = []
    for name in SENTINELS:
        if (number := special[name]) is None:
            break
        found.append(number)
    return tuple(found)


def _of_generated_text(vocab_size: int) -> tuple[int, ...]:
    """Generated tokens need no tokenizer: from the end of the vocabulary, as T5 has its sentinels."""
    return tuple(range(vocab_size - 1, max(1, vocab_size - 1 - len(SENTINELS)), -1))
