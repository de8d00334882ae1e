"""Encoding with the pieces of a sentencepiece model, BPE or unigram, to sentencepiece's ids: csrc/pieces.cpp.

A text is cut where no piece goes on; what lies between the cuts is encoded once and then looked up, where the library
encodes each text anew.
"""

import ctypes
import functools
import logging
import subprocess
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.kernels.building.places import default_cache
from megalm.kernels.building.plain import plain_library

log = logging.getLogger("megalm")

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Normalization:
    """What a model's NormalizerSpec and TrainerSpec say of what becomes of a text first."""

    table: bytes = b""
    """precompiled_charsmap."""
    trims: bool = True
    """remove_extra_whitespaces."""
    dummy: bool = True
    """add_dummy_prefix."""
    suffix: bool = False
    """treat_whitespace_as_suffix."""
    escapes: bool = True
    """escape_whitespaces."""


class PieceEncoder:
    """Encodes texts as one model does, in one thread.

    Args:
        pieces: text and score of each piece that text can become, by id.
        user_defined: which of them are user-defined symbols.
        byte_ids: ids of the 256 bytes, for what no piece covers; None where the model has none: `unknown` then.
        unigram: the most probable pieces, by their scores; otherwise pairs are merged in the order of scores.

    Raises:
        ValueError: a table of characters or pieces that this cannot be sure to read as sentencepiece does.
        OSError, RuntimeError, subprocess.SubprocessError: there is no library, and none can be compiled.
    """

    def __init__(
        self,
        pieces: dict[int, tuple[str, float]],
        user_defined: frozenset[int],
        byte_ids: Sequence[int] | None,
        unknown: int,
        normalization: Normalization,
        *,
        unigram: bool,
    ) -> None:
        self._library = _compiled()
        text, ends = _end_to_end([piece for piece, _ in pieces.values()])
        ids = np.fromiter(pieces, np.int32, len(pieces))
        scores = np.fromiter((score for _, score in pieces.values()), np.float32, len(pieces))
        if not np.isfinite(scores).all():
            raise ValueError("the model has scores that are no numbers")
        symbols = np.fromiter((number in user_defined for number in pieces), np.uint8, len(pieces))
        of_bytes = None if byte_ids is None else np.asarray(byte_ids, np.int32)
        spec = normalization
        flags = (unigram, spec.trims, spec.dummy, spec.suffix, spec.escapes)
        model = self._library.megalm_pieces_new(
            text, ends.ctypes.data, ids.ctypes.data, scores.ctypes.data, symbols.ctypes.data, len(pieces),
            None if of_bytes is None else of_bytes.ctypes.data, unknown, spec.table, len(spec.table),
            sum(flag << place for place, flag in enumerate(flags)),
        )  # fmt: skip
        if not model:
            raise ValueError("the model's table of characters, or its pieces, are not as sentencepiece writes them")
        self._model = model
        weakref.finalize(self, self._library.megalm_pieces_delete, model)

    def __call__(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], Int64s]:
        """The ids of all texts back to back, and the number of ids of each text."""
        content, ends = _end_to_end(texts)
        lengths, room = np.empty(len(texts), np.int64), len(content)
        while True:
            ids = np.empty(room, np.int32)
            total = self._library.megalm_pieces_encode(
                self._model, content, ends.ctypes.data, len(texts), ids.ctypes.data, room, lengths.ctypes.data
            )
            if total < 0:
                raise MemoryError("the ids of a text do not fit into memory")
            if total <= room:
                return ids[:total], lengths
            room = total  # a normalization that makes one character several


def _end_to_end(texts: Sequence[str]) -> tuple[bytes, Int64s]:
    """The texts as UTF-8, one after the other, and where each ends."""
    encoded = [text.encode() for text in texts]
    return b"".join(encoded), np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)), dtype=np.int64)


@functools.cache
def is_available() -> bool:
    """Whether the library is there or can be compiled; says in one line why not."""
    try:
        _compiled()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: this user has no home folder
        log.info("texts of sentencepiece models are encoded more slowly: %s", error)
        return False
    return True


@functools.cache
def _compiled() -> Any:
    library = ctypes.CDLL(str(plain_library("pieces", default_cache())))
    pointer, number, text = ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p
    library.megalm_pieces_new.restype = pointer
    library.megalm_pieces_new.argtypes = [
        text, pointer, pointer, pointer, pointer, number, pointer, ctypes.c_int32, text, number, ctypes.c_int,
    ]  # fmt: skip
    library.megalm_pieces_delete.restype, library.megalm_pieces_delete.argtypes = None, [pointer]
    library.megalm_pieces_encode.restype = number
    library.megalm_pieces_encode.argtypes = [pointer, text, pointer, number, pointer, number, pointer]
    return library
