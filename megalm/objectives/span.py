"""T5's span corruption: the encoder reads a text with holes, the decoder writes what stood in them.

Of a text `a b c d e f g` with the spans `b c` and `f`, S the sentinels and E the end: the encoder reads
`a S0 d e S1 g E`, the labels are `S0 b c S1 f E`, and the decoder reads the labels moved on by one, from a start token.
Source: Raffel et al. 2020, arXiv:1910.10683, section 3.1.4; `random_spans_noise_mask` of T5's own code.

Shapes: N tokens of a text, S encoder, T decoder.
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
from megalm.objectives.base import Example, Field, Sample, Statistics, filled
from megalm.randomness import stable_seed

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class DenoisingObjective(ABC):
    """Turns tokens [N] into `tokens` and `padding_mask` [S], `decoder_tokens`, `labels` and `loss_mask` [T].

    Behind the end of a text `padding_mask` (bool) is False and `loss_mask` (float32) 0. What is made of it depends on
    the seed and the number of the sample alone.
    """

    shared_tokens: ClassVar[int] = 0
    purpose: ClassVar[str]
    """What its seeds are for."""

    encoder_length: int
    decoder_length: int
    sentinels: tuple[int, ...]
    """At least one for each span of a whole text, in their order."""
    ids: SequenceIds
    seed: int

    @abstractmethod
    def sides(self, text: Ids, generator: np.random.Generator) -> tuple[Ids, Ids]:
        """What the encoder reads of a text, and what the decoder writes."""

    def fields(self, seq_length: int) -> Mapping[str, Field]:
        """The fields of every example, in their order."""
        return {
            "tokens": Field((seq_length,), np.int64),
            "padding_mask": Field((seq_length,), np.bool_),
            "decoder_tokens": Field((self.decoder_length,), np.int64),
            "labels": Field((self.decoder_length,), np.int64),
            "loss_mask": Field((self.decoder_length,), np.float32),
        }

    def __call__(self, sample: Sample) -> Example:
        """The arrays of one batch row."""
        text = sample.tokens[sample.tokens >= 0]  # padding is -1, at the end
        generator = np.random.default_rng(stable_seed(self.seed, self.purpose, sample.number))
        inputs, targets = self.sides(text, generator)
        decoder, S, T = np.concatenate(([self.ids.start], targets[:-1])), self.encoder_length, self.decoder_length
        return {
            "tokens": filled(inputs, S, self.ids.pad),
            "padding_mask": np.arange(S) < len(inputs),
            "decoder_tokens": filled(decoder, T, self.ids.pad),
            "labels": filled(targets, T, self.ids.pad),
            "loss_mask": (np.arange(T) < len(targets)).astype(np.float32),
        }


@dataclass(frozen=True, kw_only=True)
class SpanObjective(DenoisingObjective):
    """N is the longest text of which both lengths have room, so that a whole one fills them."""

    special_tokens: ClassVar[tuple[str, ...]] = ("pad", "bos", "eos", "eod", *SENTINELS)
    purpose: ClassVar[str] = "span"

    noise: SpanNoise

    @classmethod
    def build(cls, config: RunConfig, special: Mapping[str, int | None]) -> Self:
        """The objective that the run's settings ask for."""
        encoder, decoder = config.batch.seq_length, decoder_seq_length(config)
        assert decoder is not None, "the rules refuse models without a decoder"
        kind = denoisings(config)["span"]
        sentinels, ids = sentinels_and_ids("span", kind, config, special)
        return cls(
            noise=kind.noises[0],
            encoder_length=encoder,
            decoder_length=decoder,
            sentinels=sentinels,
            ids=ids,
            seed=config.training.seed,
        )

    def sample_tokens(self, seq_length: int) -> int:
        """The longest text that an encoder of `seq_length` has room for, and the decoder too."""
        return self.noise.text_tokens(seq_length, self.decoder_length)

    def sides(self, text: Ids, generator: np.random.Generator) -> tuple[Ids, Ids]:
        """The text with holes, and what stood in them."""
        return corrupted(text, self.noise, self.sentinels, self.ids.end, generator)

    def statistics(self, batch: Mapping[str, npt.NDArray[Any]]) -> Statistics:
        """Share of the text that is noise, mean span, share of padding."""
        return pair_statistics(batch, self.sentinels)


def pair_statistics(batch: Mapping[str, npt.NDArray[Any]], sentinels: Sequence[int], head: int = 0) -> Statistics:
    """What is counted of the batches of encoder-decoders; `head`: tokens that the encoder reads before the text."""
    rows, written = len(batch["tokens"]), batch["loss_mask"] > 0
    read = int(np.count_nonzero(batch["padding_mask"]))
    spans = int(np.isin(batch["labels"][written], sentinels).sum())
    noise = int(np.count_nonzero(written)) - spans - rows  # each ends with an end of text
    room = batch["tokens"].size + batch["labels"].size
    return {
        "mask_rate": (noise, noise + read - spans - rows * (1 + head)),
        "mean_span": (noise, spans),
        "padding_share": (room - read - int(np.count_nonzero(written)), room),
    }


def corrupted(
    text: Ids, noise: SpanNoise, sentinels: Sequence[int], end: int, generator: np.random.Generator
) -> tuple[Ids, Ids]:
    """What the encoder reads of a text, and what the decoder writes. A single span is the end of the text."""
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
    objective: str, kind: Denoising, config: RunConfig, special: Mapping[str, int | None], taken: Sequence[int] = ()
) -> tuple[tuple[int, ...], SequenceIds]:
    """As many sentinels as texts may have spans, none of those that are `taken`, and the ids around sequences.

    Raises:
        ConfigError: there are too few.
    """
    encoder = config.batch.seq_length
    spans = kind.spans(kind.text_tokens(encoder, decoder_seq_length(config)))
    if config.data.mock_data and not config.tokenizer.is_given:
        sentinels, ids = _of_generated_text(config.model.vocab_size or 0), SequenceIds(start=0, end=1, pad=0)
    else:
        sentinels, ids = _sentinels(special), SequenceIds.of(special)
    sentinels = tuple(number for number in sentinels if number not in taken)
    if len(sentinels) < spans:
        raise ConfigError(
            f"objective={objective} needs {spans} sentinels <extra_id_0>, ... for seq_length={encoder}, and there are "
            f"{len(sentinels)}; give --vocab-extra-ids {max(spans + len(taken), 100)}, or a tokenizer that has them"
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
