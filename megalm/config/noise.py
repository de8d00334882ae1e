"""How much of a text is hidden, and in what spans: T5's arithmetic, and UL2's denoisers as settings name them.

Source: Raffel et al. 2020, arXiv:1910.10683, section 3.1.4; `random_spans_helper` of T5's own code.
"""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Self


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


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """One of the ways in which UL2 hides parts of a text."""

    mode: str
    """r: regular spans, s: the rest of a sequence, x: extreme spans."""
    noise: SpanNoise

    @classmethod
    def read(cls, text: str) -> tuple[Self, ...]:
        """Those of a text as "R:0.15:3 S:0.25".

        Raises:
            ValueError: it says none.
        """
        found = []
        for word in text.replace(",", " ").split():
            mode, *numbers = word.lower().split(":")
            try:
                density, mean = (float(number) for number in (numbers if mode != "s" else [*numbers, "inf"]))
            except ValueError:
                density, mean = 0.0, 0.0
            if mode not in ("r", "s", "x") or not 0 < density < 1 or not mean >= 1:
                raise ValueError(
                    f'"{word}" must be R:DENSITY:MEAN, X:DENSITY:MEAN or S:DENSITY, with a density '
                    "between 0 and 1 and a mean span of 1 or more"
                )
            found.append(cls(mode=mode, noise=SpanNoise(density=density, mean_length=mean)))
        if not found:
            raise ValueError("must name one denoiser at least, as R:0.15:3,S:0.25")
        return tuple(found)
