"""A mistyped name in, the names that were probably meant out."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """`; did you mean "x" or "y"?` for the known names closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=2, cutoff=0.7)
    if not close:
        return ""
    return "; did you mean " + " or ".join(f'"{prefix}{name}"' for name in close) + "?"
