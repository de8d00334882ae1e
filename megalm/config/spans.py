"""Lengths of T5's span corruption, from its settings alone: objective, model, rules and planner reckon alike.

Source: Raffel et al. 2020, arXiv:1910.10683, section 3.1.4; `random_spans_helper` of T5's own code.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

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


@dataclass(frozen=True, kw_only=True)
class SpanNoise:
    """How much of a text is noise, and in what spans."""

    density: float
    mean_length: float

    def counts(self, tokens: int) -> tuple[int, int]:
        """(noise tokens, spans) of a text of so many tokens; of less than two tokens none is noise."""
        if tokens < 2:
            return 0, 0
        noise = min(max(round(tokens * self.density), 1), tokens - 1)
        # every span stands between tokens that stay
        return noise, min(max(round(noise / self.mean_length), 1), tokens - noise)

    def lengths(self, tokens: int) -> tuple[int, int]:
        """What a text of so many tokens becomes: (encoder tokens, decoder tokens), each with an end of text.

        Both have one sentinel for each span.
        """
        noise, spans = self.counts(tokens)
        return tokens - noise + spans + 1, noise + spans + 1

    def text_tokens(self, encoder: int, decoder: int | None = None) -> int:
        """Tokens of the longest text that fits an encoder and, if its length is given, a decoder; 0: none does."""

        def is_too_long(tokens: int) -> bool:
            inputs, targets = self.lengths(tokens)
            return inputs > encoder or (decoder is not None and targets > decoder)

        # both lengths grow with the text, and more than its share of noise leaves no encoder
        most = int((encoder + 2) / (1 - self.density)) + 2
        return bisect_left(range(1, most), True, key=is_too_long)


def span_noise(config: RunConfig) -> SpanNoise:
    """What the run's settings say of noise."""
    return SpanNoise(density=config.data.noise_density, mean_length=config.data.mean_noise_span_length)


def decoder_seq_length(config: RunConfig) -> int | None:
    """Tokens of the decoder: as given, or as span corruption fills them where the encoder is full; None: nobody knows.

    Of models without a decoder None.
    """
    if not config.model.encoder_decoder:
        return None
    if config.model.decoder_seq_length is not None or "span" not in config.training.objectives:
        return config.model.decoder_seq_length
    noise = span_noise(config)
    return noise.lengths(noise.text_tokens(config.batch.seq_length))[1]
