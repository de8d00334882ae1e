"""Texts to token ids in bulk: by the tokenizer's own library, or by gigatoken where it gives the same ids."""

import functools
import itertools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megalm.config.data import TokenizerConfig
from megalm.data.tokenizers import (
    ByteLevelTokenizer,
    GPT2BPETokenizer,
    GPTSentencePieceTokenizer,
    HFTokenizer,
    NullTokenizer,
    TikTokenizer,
    Tokenizer,
    build_tokenizer,
)

Ids = npt.NDArray[np.integer[Any]]
Lengths = npt.NDArray[np.int64]


class Encoder(Protocol):
    """Texts to ids."""

    def __call__(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        """The ids of all texts back to back, and the number of ids of each text."""


@functools.lru_cache(maxsize=1)
def tokenizer_of(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of `config`, built once a process; forked workers inherit the main process's."""
    return build_tokenizer(config)


@functools.lru_cache(maxsize=2)
def encoder_of(config: TokenizerConfig, *, fast: bool) -> Encoder:
    """The encoder of `config`; `fast` for gigatoken, which `choose_encoder` has found to give the same ids."""
    tokenizer = tokenizer_of(config)
    library = LibraryEncoder(tokenizer)
    return GigatokenEncoder(tokenizer, library, config.vocab_extra_ids or 0) if fast else library


class LibraryEncoder:
    """Encodes with the library that the tokenizer is made for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode = tokenizer.encode_batch

    def __call__(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        """The ids of all texts back to back, and the number of ids of each text."""
        documents = self._encode(texts)
        lengths = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
        ids = np.fromiter(itertools.chain.from_iterable(documents), dtype=np.int64, count=int(lengths.sum()))
        return ids, lengths


class GigatokenEncoder:
    """Encodes with gigatoken; texts that spell a special token go to the library, which may take them as text.

    So do texts in which a model's normalization may come out otherwise (see `_RISKS`), where it does so on HARD_TEXTS.

    Raises:
        Exception: whatever gigatoken raises for a tokenizer that it does not know.
    """

    def __init__(self, tokenizer: Tokenizer, library: LibraryEncoder, extra_ids: int = 0) -> None:
        self._model: Any = _gigatokens(tokenizer)
        self._library = library
        names = {piece.decode(errors="replace") for piece in self._model.vocab.values() if _SPECIAL.fullmatch(piece)}
        if not isinstance(tokenizer, TikTokenizer):  # a BPE file names none
            names |= set(self._model.as_hf().all_special_tokens)
        names |= set(PEER_NAMES)
        names |= {f"<extra_id_{number}>" for number in range(extra_ids)}
        self._differing = tuple(sorted(name for name in names if self._differs(name)))
        self._beginnings = {name[0] for name in self._differing}
        expected = library(HARD_TEXTS)
        for risk in _RISKS:
            self._is_risky = risk
            if _equal(self(HARD_TEXTS), expected):
                break

    def __call__(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        """The ids of all texts back to back, and the number of ids of each text."""
        special = [number for number, text in enumerate(texts) if self._is_special(text)]
        if not special:
            return self._encode(texts)
        plain = sorted(set(range(len(texts))) - set(special))
        return _interleaved(
            len(texts),
            (plain, self._encode([texts[number] for number in plain])),
            (special, self._library([texts[number] for number in special])),
        )

    def _encode(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        if not texts:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        layout = self._model.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)

    def _is_special(self, text: str) -> bool:
        # most texts hold no "<" at all: one look in place of one for each name
        spelled = any(first in text for first in self._beginnings) and any(name in text for name in self._differing)
        return spelled or self._is_risky(text)

    def _differs(self, name: str) -> bool:
        texts = [name, f"a{name}b", f"a {name} b"]
        return not _equal(self._encode(texts), self._library(texts))


def _gigatokens(tokenizer: Tokenizer) -> Any:
    """gigatoken's model of a tokenizer, without special tokens where they are text to the tokenizer."""
    from gigatoken import Tokenizer as Model

    if isinstance(tokenizer, HFTokenizer | GPT2BPETokenizer):
        return Model.from_json(tokenizer.to_json())
    if isinstance(tokenizer, GPTSentencePieceTokenizer):
        return Model.from_sentencepiece(tokenizer.path)
    if not isinstance(tokenizer, TikTokenizer):
        raise TypeError(f"it is told nothing of {type(tokenizer).__name__}")
    return Model.from_tiktoken(tokenizer.path, tokenizer.pattern, {})


def _never(text: str) -> bool:
    """Nothing is risky: a model that does not normalize."""
    return False


def _may_combine(text: str) -> bool:
    """Whether characters of a text may become others together (marks, Hangul jamo), or vanish (controls)."""
    if text.isascii():
        return not text.replace("\n", "").replace("\r", "").replace("\t", "").isprintable()
    return _combining().search(text) is not None


def _may_combine_or_trim(text: str) -> bool:
    """The same, or whether it begins or ends with white space that is not a blank: gigatoken trims that too."""
    return text.strip(" ") != text.strip() or _may_combine(text)


_RISKS = (_never, _may_combine, _may_combine_or_trim)
"""Which texts are left to the library; the first that suffices for a model is taken."""


@functools.cache
def _combining() -> re.Pattern[str]:
    """Marks, controls, jamo, sentencepiece's sign for a blank, and all beyond Unicode's first plane but for emoji."""
    marks = "".join(
        char for char in map(chr, range(0x80, 0x10000)) if unicodedata.category(char).startswith(("M", "C"))
    )
    jamo = "\u1100-\u11ff\ua960-\ua97f\ud7b0-\ud7ff"
    return re.compile(f"[\0-\x08\x0b\x0c\x0e-\x1f\x7f{jamo}\u2581{marks}\U00010000-\U0001efff\U00020000-\U0010ffff]")


PEER_NAMES = ("<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>", "<BOS>", "<EOS>")
"""Special tokens that Megatron adds to a model, which gigatoken does not know of."""
_SPECIAL = re.compile(rb"<.+>|\[.+\]|.*\|.+\|.*", re.DOTALL)
"""Names as special tokens have them: <s>, [SEP], <|endoftext|>."""


def _interleaved(total: int, *parts: tuple[list[int], tuple[Ids, Lengths]]) -> tuple[Ids, Lengths]:
    """The ids of `total` texts in order, from parts that hold the texts of the given numbers."""
    pieces: list[Ids] = [np.empty(0, np.int64)] * total
    for numbers, (ids, lengths) in parts:
        ends = np.cumsum(lengths)
        for number, start, stop in zip(numbers, ends - lengths, ends, strict=True):
            pieces[number] = ids[start:stop]
    return np.concatenate(pieces), np.fromiter(map(len, pieces), dtype=np.int64, count=total)


def _equal(left: tuple[Ids, Lengths], right: tuple[Ids, Lengths]) -> bool:
    return np.array_equal(left[1], right[1]) and np.array_equal(left[0], right[0])


HARD_TEXTS = (
    "", " ", " a", "a ", "  two  blanks  ", "\t\ttabs", "line\nline\r\n\r\n\n\nline", "\0\x01\x7f\x85", "\ufeffbom",
    "\u00a0\u2003\u200b\u200d", "caf\u00e9 cafe\u0301 \ufb01 \u01c6 \u1e9b\u0323", "\u0130i\u0131I \u00df\u1e9e",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3002 \ud55c\uad6d\uc5b4 \u4e2d\u6587",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001d54f", "\u2581\u2581a\u2581b",
    "\ufffd\ufffe\U0010ffff", "a" * 300, "=" * 200, "1234567890" * 20, "don't I'LL we've 'tis",
    "x=1;y[2]={'k':3.14e-5}  # c\n    return f(x)\n", "<s></s><unk><0x41><|endoftext|>[SEP]<EOD>a<CLS><pad>",
)  # fmt: skip
"""Texts in which encoders differ when they differ at all."""


@dataclass(frozen=True)
class Choice:
    """Whether gigatoken is used, and why."""

    fast: bool
    reason: str


def choose_encoder(config: TokenizerConfig, sample: Sequence[str]) -> Choice:
    """Tries gigatoken against the library on HARD_TEXTS and `sample`: it is used when every id is equal."""
    tokenizer = tokenizer_of(config)
    kind = type(tokenizer).__name__
    if isinstance(tokenizer, ByteLevelTokenizer | NullTokenizer):
        return Choice(False, f"encoder: {kind} itself, which needs no library")
    try:
        import gigatoken  # noqa: F401
    except ImportError:
        return Choice(False, f"encoder: {kind}'s own library (gigatoken is not installed: several times faster)")
    try:
        encoder = encoder_of(config, fast=True)
        texts = [*HARD_TEXTS, *sample]
        if not _equal(encoder(texts), LibraryEncoder(tokenizer)(texts)):
            return Choice(False, f"encoder: {kind}'s own library (gigatoken gives other ids on a sample)")
    # What gigatoken raises for a model that it does not know is not written down anywhere.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        return Choice(False, f"encoder: {kind}'s own library (gigatoken cannot load it: {reason})")
    return Choice(True, f"encoder: gigatoken, ids equal to {kind}'s on a sample of {len(texts)} texts")
