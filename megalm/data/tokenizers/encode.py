"""Texts to token ids in bulk: by the tokenizer's own library, or by a faster way that is compared with it all along."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalm.config.data import TokenizerConfig
from megalm.data.tokenizers import (
    ByteLevelTokenizer,
    GPTSentencePieceTokenizer,
    NullTokenizer,
    Tokenizer,
    build_tokenizer,
)
from megalm.data.tokenizers.fast import HARD_TEXTS, Encoder, FastEncoder, Ids, Lengths, same_ids
from megalm.errors import DataError


@functools.lru_cache(maxsize=1)
def tokenizer_of(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of `config`, built once a process; forked workers inherit the main process's."""
    return build_tokenizer(config)


@functools.lru_cache(maxsize=2)
def encoder_of(config: TokenizerConfig, *, fast: bool) -> Encoder:
    """The encoder of `config`; `fast` for the one that `choose_encoder` has found to give the same ids."""
    tokenizer = tokenizer_of(config)
    library = LibraryEncoder(tokenizer)
    return ComparedEncoder(FastEncoder(tokenizer, library), library, type(tokenizer).__name__) if fast else library


class LibraryEncoder:
    """Encodes with the library that the tokenizer is made for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode: Callable[[Sequence[str]], Sequence[Any]] = tokenizer.encode_batch
        if type(tokenizer) is GPTSentencePieceTokenizer:  # arrays come a third faster than lists
            self._encode = tokenizer.encode_arrays

    def __call__(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        """The ids of all texts back to back, and the number of ids of each text."""
        documents = self._encode(texts)
        lengths = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
        if documents and isinstance(documents[0], np.ndarray):
            return np.concatenate(documents), lengths
        ids = np.fromiter(itertools.chain.from_iterable(documents), dtype=np.int64, count=int(lengths.sum()))
        return ids, lengths


class WrongIdsError(DataError):
    """The fast encoder has given other ids than the library."""


class ComparedEncoder:
    """The fast encoder, whose ids for a share of the texts are compared with the library's as they go by.

    Raises:
        WrongIdsError (when called): they differ.
    """

    COMPARED_CHARS = 2048
    """Of each batch (a chunk of about 1 MiB): so much of two texts."""

    def __init__(self, fast: Encoder, library: Encoder, kind: str) -> None:
        self.fast, self._library, self._kind = fast, library, kind
        self._turn = 0

    def __call__(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        """The ids of all texts back to back, and the number of ids of each text."""
        if texts:
            self._turn += 1
            picked = {self._turn * 7919 % len(texts), self._turn * 104729 % len(texts)}
            self._compare([texts[number][: self.COMPARED_CHARS] for number in sorted(picked)])
        return self.fast(texts)

    def _compare(self, texts: list[str]) -> None:
        if same_ids(self.fast(texts), self._library(texts)):
            return
        differ = (text for text in texts if not same_ids(self.fast([text]), self._library([text])))
        text = next(differ, texts[0])
        raise WrongIdsError(
            f"the fast encoder gives other ids than {self._kind}'s own library for a text that begins with "
            f"{text[:60]!r}; nothing was published: run again with --encoder library, and please report the tokenizer"
        )


@dataclass(frozen=True)
class Choice:
    """Whether the fast encoder is used, and why."""

    fast: bool
    reason: str


def choose_encoder(config: TokenizerConfig, sample: Sequence[str]) -> Choice:
    """Tries the fast encoder against the library on HARD_TEXTS and `sample`: it is used when every id is equal."""
    tokenizer = tokenizer_of(config)
    kind = type(tokenizer).__name__
    if isinstance(tokenizer, ByteLevelTokenizer | NullTokenizer):
        return Choice(False, f"encoder: {kind} itself, which needs no library")
    try:
        encoder: Any = encoder_of(config, fast=True)  # which the workers inherit
        texts = [*HARD_TEXTS, *sample]
        if not same_ids(encoder.fast(texts), LibraryEncoder(tokenizer)(texts)):
            return Choice(False, f"encoder: {kind}'s own library ({encoder.fast.names} gives other ids on a sample)")
    except ImportError:
        return Choice(False, f"encoder: {kind}'s own library (gigatoken is not installed: several times faster)")
    # What gigatoken raises for a model that it does not know is not written down anywhere.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        return Choice(False, f"encoder: {kind}'s own library (gigatoken cannot load it: {reason})")
    return Choice(
        True,
        f"encoder: {encoder.fast.names}; ids equal to {kind}'s on a sample of {len(texts)} texts, and compared on a "
        "share of all",
    )
