"""Random texts that make encoders differ where they can."""

import random
from collections.abc import Iterator, Sequence


def texts_of(parts: Sequence[str], most: int, draw: random.Random, count: int) -> Iterator[str]:
    """Texts of less than `most` of `parts` end to end, now and then with any character in between."""
    for _ in range(count):
        chosen = draw.choices(parts, k=draw.randrange(1, most))
        if draw.random() < 0.3:
            chosen.insert(draw.randrange(len(chosen)), any_character(draw))
        yield "".join(chosen)


def any_character(draw: random.Random) -> str:
    """Any but half of a surrogate pair, of which a question mark."""
    code = draw.randrange(draw.choice([0x300, 0x3000, 0x10000, 0x30000, 0x110000]))
    return "?" if 0xD800 <= code < 0xE000 else chr(code)
