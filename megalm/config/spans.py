"""Lengths of spans, from the settings alone: objectives, model, rules and planner reckon alike.

Source of T5's: Raffel et al. 2020, arXiv:1910.10683, section 3.1.4; `random_spans_helper` of T5's own code.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

from megalm.config.data import DataConfig
from megalm.config.noise import Denoiser, SpanNoise
from megalm.config.sections import RunConfig
from megalm.errors import ConfigError

SENTINELS = tuple(f"extra_id_{number}" for number in range(1000))
"""Names by which sentinels are asked for, in their order."""


@dataclass(frozen=True, kw_only=True)
class SequenceIds:
    """Token ids around the sequences of an encoder-decoder."""

    start: int
    """What the decoder reads first."""
    end: int
    """Last of what the encoder reads, and of what the decoder writes."""
    pad: int

    @classmethod
    def of(cls, special: Mapping[str, int | None]) -> Self:
        """The ids of a tokenizer's special tokens: as T5 has it, the decoder starts from padding.

        Raises:
            ConfigError: no token ends a text.
        """
        found = {name: number for name, number in special.items() if number is not None}
        end = found.get("eos", found.get("eod"))
        if end is None:
            raise ConfigError("objective=span needs a tokenizer with an end-of-text token (</s>, <eos>, ...)")
        start = found.get("pad", found.get("bos", end))
        return cls(start=start, end=end, pad=found.get("pad", end))


def span_noise(config: RunConfig) -> SpanNoise:
    """What the run's settings say of noise."""
    return SpanNoise(density=config.data.noise_density, mean_length=config.data.mean_noise_span_length)


@dataclass(frozen=True, kw_only=True)
class MaskedRuns:
    """How long the runs of tokens or words are that masked language modelling hides."""

    longest: int
    shape: Literal["inverse", "longer", "geometric"] = "inverse"
    """P(n) ~ 1 / n: Lan et al. 2019 (ALBERT), arXiv:1909.11942, section 3.1; the same from the other end, as Megatron;
    or ~ 0.8^n: Joshi et al. 2019 (SpanBERT), arXiv:1907.10529, section 3.1."""

    @classmethod
    def of(cls, data: DataConfig) -> Self:
        """What the run's settings say of them."""
        geometric = data.masking_use_geometric_distribution
        longest = data.masking_max_ngram or (10 if geometric else 1)
        if geometric:
            return cls(longest=longest, shape="geometric")
        return cls(longest=longest, shape="longer" if data.masking_use_longer_ngrams else "inverse")

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Those of lengths 1, 2, ..., `longest`."""
        lengths = range(1, self.longest + 1)
        weights = [0.8**n if self.shape == "geometric" else 1 / n for n in lengths]
        if self.shape == "longer":
            weights.reverse()
        return tuple(weight / sum(weights) for weight in weights)

    @property
    def mean(self) -> float:
        """The mean length."""
        return sum(n * probability for n, probability in enumerate(self.probabilities, 1))


@dataclass(frozen=True, kw_only=True)
class Denoising:
    """What an objective of encoder-decoders makes of texts: span corruption of one kind, or of several."""

    noises: tuple[SpanNoise, ...]
    head: int = 0
    """Tokens that the encoder reads before the text."""

    def text_tokens(self, encoder: int, decoder: int | None = None) -> int:
        """Tokens of the longest text of which all kinds fit; 0: none does."""
        return min(noise.text_tokens(encoder - self.head, decoder) for noise in self.noises)

    def row_tokens(self, length: int) -> int:
        """Tokens of the longest text of which, of all kinds, what is read and what is written fit a row of a decoder.

        The last token that is written is a label only; 0: none fits.
        """

        def is_too_long(tokens: int) -> bool:
            return any(self.head + sum(noise.lengths(tokens)) - 1 > length for noise in self.noises)

        return bisect_left(range(1, length + 1), True, key=is_too_long)

    def too_long(self, tokens: int) -> SpanNoise | None:
        """The first kind whose spans are longer on average than the noise of a text of so many tokens."""
        return next((n for n in self.noises if n.counts(tokens)[0] < n.mean_length < math.inf), None)

    def decoder_tokens(self, encoder: int) -> int:
        """Tokens of the decoder that has room for all kinds, where the longest text fills the encoder."""
        text = self.text_tokens(encoder)
        return max(noise.lengths(text)[1] for noise in self.noises)

    def spans(self, tokens: int) -> int:
        """Most spans of a text of so many tokens."""
        return max(noise.counts(tokens)[1] for noise in self.noises)


def denoisings(config: RunConfig) -> dict[str, Denoising]:
    """That of each objective of the run that is one, by name.

    Raises:
        ValueError: as `Denoiser.read`.
    """
    found = {}
    if "span" in config.training.objectives:
        found["span"] = Denoising(noises=(span_noise(config),))
    if "ul2" in config.training.objectives:
        found["ul2"] = Denoising(noises=tuple(d.noise for d in Denoiser.read(config.data.ul2_denoisers)), head=1)
    return found


def decoder_seq_length(config: RunConfig) -> int | None:
    """Tokens of the decoder: as given, or as span corruption fills them where the encoder is full; None: nobody knows.

    Of models without a decoder None.
    """
    if not config.model.encoder_decoder:
        return None
    if config.model.decoder_seq_length is not None:
        return config.model.decoder_seq_length
    lengths = [found.decoder_tokens(config.batch.seq_length) for found in denoisings(config).values()]
    return max(lengths, default=None)
