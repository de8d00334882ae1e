"""An example as a table that people read: what stands at each position, what it sees, what is to be said there.

Shapes: T sequence, S keys.
"""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.objectives.base import Example
from megalm.objectives.causal import document_starts

Bools = npt.NDArray[np.bool_]
_COLUMNS = ("position", "id", "text", "document", "target", "weight", "sees")
_PICTURE = 48
"""Most characters of a picture of what a position sees."""
_ALL, _SOME, _NONE = "█", "▒", "·"
_BLANKS = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "↵"})


@dataclass(frozen=True)
class Table:
    """One sequence of an example."""

    title: str
    rows: tuple[tuple[str, ...], ...]
    """As `_COLUMNS` has them."""

    def __str__(self) -> str:
        lines = [_COLUMNS, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
        shown = ("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join([self.title, *(line.rstrip() for line in shown)])

    def html(self) -> str:
        """The table as HTML."""
        head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
        lines = []
        for row in self.rows:
            cells = "".join(f"<td>{html.escape(word)}</td>" for word in row)
            lines.append(f"<tr{' class=counts' if row[5] else ''}>{cells}</tr>")
        return f"<h2>{html.escape(self.title)}</h2>\n<table>\n<tr>{head}</tr>\n" + "\n".join(lines) + "\n</table>\n"


PAGE = (
    "<!doctype html>\n<meta charset=utf-8>\n<title>megalm show-sample</title>\n<style>body{font-family:sans-serif}"
    "table{border-collapse:collapse;font-family:monospace}td,th{padding:0 .7em;text-align:left;white-space:pre}"
    "tr.counts td:nth-child(5){background:#cfc}</style>\n"
)
"""The head of a page of tables."""


@dataclass(frozen=True)
class Words:
    """How ids are shown."""

    decode: Callable[[Sequence[int]], str] | None
    """Of a tokenizer; None: ids stand for themselves."""
    special: Mapping[str, int]
    """Ids by their special names."""

    def __call__(self, number: int) -> str:
        """The text of an id, blanks to be seen; a special one has its name in <>."""
        names = [name for name, own in self.special.items() if own == number]
        if names:
            return f"<{next((name for name in names if not name.startswith('extra_id')), names[0])}>"
        text = "" if self.decode is None else self.decode([number])
        return text.translate(_BLANKS) or f"#{number}"


def tables(row: Example, words: Words, *, causal: bool, title: str) -> list[Table]:
    """The tables of an example: one, or of an encoder-decoder two."""
    eod = words.special.get("eod")
    if "decoder_tokens" not in row:
        sees = visible(row, causal=causal)
        return [Table(title, _rows(row["tokens"], row, words, sees, eod))]
    encoder, decoder = len(row["tokens"]), len(row["decoder_tokens"])
    real = np.broadcast_to(row["padding_mask"], (encoder, encoder))
    own, read = np.tri(decoder, dtype=bool), np.broadcast_to(row["padding_mask"], (decoder, encoder))
    return [
        Table(f"{title}, encoder", _rows(row["tokens"], {}, words, real, eod)),
        Table(
            f"{title}, decoder (sees itself | the encoder)", _rows(row["decoder_tokens"], row, words, own, eod, read)
        ),
    ]


def visible(row: Example, *, causal: bool) -> Bools:
    """What each position sees of its row, bool [T, T], without windows."""
    T = len(row["tokens"])
    sees = np.tri(T, dtype=bool) if causal else np.ones((T, T), dtype=bool)
    edges = row.get("cu_seqlens", np.array([0, T]))
    edges = edges[: int(np.searchsorted(edges, T)) + 1]
    for number, prefix in enumerate(row.get("prefix_lengths", ())[: len(edges) - 1]):
        start = int(edges[number])
        sees[start : start + prefix, start : start + prefix] = True
    of = np.searchsorted(edges, np.arange(T), side="right")
    found: Bools = sees & (of[:, None] == of[None, :])
    return found


def _rows(
    tokens: npt.NDArray[Any],
    row: Example,
    words: Words,
    sees: Bools,
    eod: int | None,
    more: Bools | None = None,
) -> tuple[tuple[str, ...], ...]:
    labels, weights = row.get("labels"), row.get("loss_mask")
    starts = np.zeros(1, dtype=np.int64) if eod is None else document_starts(tokens, eod)
    documents = np.searchsorted(row.get("cu_seqlens", starts), np.arange(len(tokens)), side="right")
    if "cu_seqlens" in row:  # behind the last place there is only padding
        documents = np.minimum(documents, len(np.unique(row["cu_seqlens"])) - 1)
    types = row.get("token_types")
    found = []
    for place, token in enumerate(tokens.tolist()):
        weight = 0.0 if weights is None else float(weights[place])
        target = words(int(labels[place])) if labels is not None and weight else ""
        document = f"{documents[place]}" if types is None else f"{documents[place]} {'AB'[int(types[place])]}"
        picture = _picture(sees[place]) + ("" if more is None else f"|{_picture(more[place])}")
        found.append((f"{place}", f"{token}", words(token), document, target, f"{weight:g}" if weight else "", picture))
    return tuple(found)


def _picture(sees_S: Bools) -> str:
    """A character for each key, or for several: seen, some of them seen, not seen."""
    size = -(-len(sees_S) // _PICTURE)
    parts = (sees_S[start : start + size] for start in range(0, len(sees_S), size))
    return "".join(_ALL if part.all() else _SOME if part.any() else _NONE for part in parts)
