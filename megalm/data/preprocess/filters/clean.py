"""Cleaning of texts before they become tokens: encodings, Unicode form, control characters."""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import Any

_LINE_ENDS = re.compile(r"\r\n?")
_CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f\x80-\x84\x86-\x9f\ufeff\ufffe\uffff]")
"""Control characters but for tab, line feed and next line; marks of byte order and noncharacters."""


def clean(text: str, counts: Counter[str]) -> str:
    """`text` with broken encodings repaired (by ftfy where it is installed), line ends as LF, no control
    characters, in Unicode NFC; what was changed is counted, once per text.
    """
    steps: list[tuple[str, Callable[[str], str]]] = [
        ("broken encoding repaired", _fix_encoding()),
        ("line ends", lambda text: _LINE_ENDS.sub("\n", text) if "\r" in text else text),
        ("control characters removed", lambda text: _CONTROLS.sub("", text)),
        ("brought to NFC", lambda text: text if text.isascii() else unicodedata.normalize("NFC", text)),
    ]
    for name, step in steps:
        changed = step(text)
        if changed is not text and changed != text:
            counts[name] += 1
        text = changed
    return text


def versions() -> dict[str, str]:
    """The versions on which the result of `clean` depends."""
    ftfy = _ftfy()
    return {"unicode": unicodedata.unidata_version, "ftfy": ftfy.__version__ if ftfy else "not installed"}


@functools.cache
def _ftfy() -> Any:
    try:
        import ftfy
    except ImportError:
        return None
    return ftfy


@functools.cache
def _fix_encoding() -> Callable[[str], str]:
    ftfy = _ftfy()
    if ftfy is None:
        return lambda text: text
    return lambda text: text if text.isascii() else ftfy.fix_encoding(text)
