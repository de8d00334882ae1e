"""Texts through a sentencepiece BPE model word by word: a word that came before is looked up, not encoded again.

Where the model trims blanks, puts one before a text, and has no piece that goes on beyond a word, no merge crosses a
blank. The ids of a text are then those of its words end to end, each as the library encodes it alone.
"""

import functools
import itertools
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.data.tokenizers.sentence_piece import BLANK, GPTSentencePieceTokenizer

Ids = npt.NDArray[np.integer[Any]]
Lengths = npt.NDArray[np.int64]
Encode = Callable[[Sequence[str]], tuple[Ids, Lengths]]

MAX_WORDS = 1 << 18
"""Words that are remembered."""
MAX_CHARS = 32
"""A longer word is not: it will hardly come again."""


def words_suit(tokenizer: GPTSentencePieceTokenizer) -> bool:
    """Whether the texts of a model may be encoded word by word."""
    proto = tokenizer.proto()
    kinds = proto.SentencePiece.Type
    used = {kinds.Value("NORMAL"), kinds.Value("USER_DEFINED")}
    pieces = [piece.piece for piece in proto.pieces if piece.type in used]
    return (
        proto.trainer_spec.model_type == proto.trainer_spec.ModelType.Value("BPE")
        and proto.normalizer_spec.remove_extra_whitespaces
        and proto.normalizer_spec.add_dummy_prefix
        and (proto.trainer_spec.byte_fallback or BLANK in pieces)  # else unknown words become one
        and not any(BLANK in piece.lstrip(BLANK) for piece in pieces)
        and not any(piece.type == kinds.Value("USER_DEFINED") and _has_blank(piece.piece) for piece in proto.pieces)
    )


def _has_blank(text: str) -> bool:
    return BLANK in text or text.split() != [text]


class WordEncoder:
    """Encodes word by word; `encode` takes the words that are new, the library the texts whose words hang together."""

    def __init__(self, tokenizer: GPTSentencePieceTokenizer, encode: Encode) -> None:
        self._encode, self._library = encode, tokenizer.encode_pieces
        self._known: dict[str, list[int] | None] = {}
        odd = [char for char in _white_space() if tokenizer.normalize([f"a{char}b"]) != [f"{BLANK}a{BLANK}b"]]
        self._odd = re.compile(f"[{BLANK}{''.join(map(re.escape, odd))}]")

    def __call__(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        """The ids of all texts back to back, and the number of ids of each text."""
        words = [text.split() for text in texts]
        new = [word for word in set().union(*words) if word not in self._known]
        self._learn(new)
        documents = [self._ids(text, own) for text, own in zip(texts, words, strict=True)]
        lengths = np.fromiter(map(len, documents), np.int64, len(documents))
        ids = np.fromiter(itertools.chain.from_iterable(documents), np.int32, int(lengths.sum()))
        self._forget(new)
        return ids, lengths

    def _ids(self, text: str, words: list[str]) -> list[int]:
        if self._odd.search(text) is None:
            try:
                return list(itertools.chain.from_iterable(map(self._known.__getitem__, words)))  # type: ignore[arg-type]
            except TypeError:
                pass  # a word that is not known by itself
        return self._library(text)

    def _learn(self, words: list[str]) -> None:
        ids, lengths = self._encode(words)
        flat, ends = ids.tolist(), np.cumsum(lengths).tolist()
        starts = [0, *ends[:-1]]
        self._known |= {word: flat[start:end] for word, start, end in zip(words, starts, ends, strict=True)}
        # a mark at the start of a word may belong to the blank before it
        self._known |= {word: None for word in words if unicodedata.category(word[0]).startswith("M")}

    def _forget(self, words: list[str]) -> None:
        for word in words:
            if len(word) > MAX_CHARS:
                del self._known[word]
        if len(self._known) > MAX_WORDS:
            self._known.clear()


@functools.cache
def _white_space() -> str:
    """What Python's `split` cuts at."""
    return "".join(char for char in map(chr, range(sys.maxunicode + 1)) if char.isspace())
