"""Characters that a page or an editor put in the place of those that one types: dashes, blanks, quotes."""

import re
import unicodedata

_DASHES = "\u2010-\u2015\u2212\ufe58\ufe63\uff0d"
_BLANKS = "\u00a0\u1680\u2000-\u200f\u2028\u2029\u202f\u205f\u2060\u3000\ufeff\u00ad"
_PASTED_FLAG = re.compile(rf"-*[{_DASHES}][{_DASHES}\-]*(?=[A-Za-z])")
_ODD_BLANK = re.compile(f"[{_BLANKS}]+")
_PASTED = re.compile(f"[{_DASHES}{_BLANKS}\u00ab\u00bb\u2018-\u201f\uff01-\uff5e]")


def typed(words: list[str]) -> tuple[list[str], list[str]]:
    """The words of a command line as they were meant, and what to say about those that were not typed so."""
    meant: list[str] = []
    problems: list[str] = []
    for word in words:
        dashes = _PASTED_FLAG.match(word)
        if dashes is not None and not re.search(r"\s", word):
            odd = next(character for character in dashes[0] if character != "-")
            fixed = "--" + word[dashes.end() :]
            problems.append(f'"{word}" begins with {_named(odd)}, not with two hyphens; write {fixed}')
            word = fixed
        if word.startswith("--") and (blank := _ODD_BLANK.search(word.partition("=")[0])) is not None:
            parts = [part for part in _ODD_BLANK.split(word) if part]
            problems.append(f'"{word}" holds {_named(blank[0][0])}; type a blank: {" ".join(parts)}')
            meant += parts
        else:
            meant.append(word)
    return meant, problems


def pasted_in(value: object) -> str:
    """What to add to the refusal of a value that holds such a character, which looks right and is not."""
    found = _PASTED.search(value) if isinstance(value, str) else None
    return "" if found is None else f"; it holds {_named(found[0])}: type it anew"


def _named(character: str) -> str:
    """A character by its name and number."""
    name = unicodedata.name(character, "a character without a name").lower()
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name} (U+{ord(character):04X})"
