"""Sentences of a text, by NLTK's Punkt as Megatron's `--split-sentences` has them."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

from megalm.errors import PlatformError

ABBREVIATIONS = frozenset(
    """a.m p.m e.g i.e etc vs cf al fig no vol pp ed eds approx dr mr mrs ms prof rev gen col lt sgt st sr jr inc ltd co
    corp dept univ jan feb mar apr jun jul aug sep sept oct nov dec u.s u.k ph.d""".split()  # noqa: SIM905 (readable)
)
"""English abbreviations for the splitter that goes without NLTK's data."""


def split(text: str, language: str, *, keep_newlines: bool) -> list[str]:
    """The sentences of `text`; with `keep_newlines` each keeps what follows it up to the next.

    Raises:
        PlatformError: NLTK is not installed, or there is no model of `language`.
    """
    spans = list(_splitter(language)[0](text))
    if not keep_newlines:
        return [text[start:stop] for start, stop in spans]
    starts = [0, *(start for start, _ in spans[1:]), len(text)]
    return [text[start:stop] for start, stop in itertools.pairwise(starts) if stop > start]


def version(language: str) -> str:
    """Which splitter is used, for the summary and the manifest.

    Raises:
        PlatformError: NLTK is not installed, or there is no model of `language`.
    """
    return _splitter(language)[1]


@functools.cache
def _splitter(language: str) -> tuple[Callable[[str], Any], str]:
    try:
        import nltk
        from nltk.tokenize import punkt
    except ImportError as error:
        raise PlatformError("--split-sentences needs the package nltk; `pip install nltk`") from error
    try:
        return punkt.PunktTokenizer(language).span_tokenize, f"nltk {nltk.__version__} punkt_tab ({language})"
    except LookupError as error:
        if language != "english":
            raise PlatformError(
                f"NLTK has no sentence model for --lang {language}; `python -m nltk.downloader punkt_tab` on a "
                "machine with network, and copy ~/nltk_data"
            ) from error
    parameters = punkt.PunktParameters()
    parameters.abbrev_types.update(ABBREVIATIONS)
    splitter = punkt.PunktSentenceTokenizer(parameters)
    return (
        splitter.span_tokenize,
        f"nltk {nltk.__version__} Punkt with {len(ABBREVIATIONS)} abbreviations (no punkt_tab)",
    )
