"""Byte-pair encoding with the pieces of a sentencepiece model, each word once: csrc/bpe.cpp.

On text whose words come again it is many times as fast as the library, which merges each anew. The texts are normalized
already, with U+2581 for blanks.
"""

import ctypes
import functools
import logging
import subprocess
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.kernels.building.places import default_cache
from megalm.kernels.building.plain import plain_library

log = logging.getLogger("megalm")

Int64s = npt.NDArray[np.int64]


class PieceEncoder:
    """Encodes normalized texts with the pieces of one model, in one thread.

    No piece may go on behind a word: hold U+2581 after something else.

    Args:
        pieces: text and score of each piece that text can become, by id.
        byte_ids: ids of the 256 bytes, for what no piece covers; None where the model has none: `unknown` then.
    """

    def __init__(self, pieces: dict[int, tuple[str, float]], byte_ids: Sequence[int] | None, unknown: int) -> None:
        self._library = _compiled()
        text, ends = _end_to_end([piece for piece, _ in pieces.values()])
        ids = np.fromiter(pieces, np.int32, len(pieces))
        scores = np.fromiter((score for _, score in pieces.values()), np.float32, len(pieces))
        of_bytes = np.full(256, -1, np.int32) if byte_ids is None else np.asarray(byte_ids, np.int32)
        self._model = self._library.megalm_bpe_new(
            text, ends.ctypes.data, ids.ctypes.data, scores.ctypes.data, len(pieces), of_bytes.ctypes.data, unknown
        )
        weakref.finalize(self, self._library.megalm_bpe_delete, self._model)

    def __call__(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], Int64s]:
        """The ids of all texts back to back, and the number of ids of each text."""
        content, ends = _end_to_end(texts)
        ids, lengths = np.empty(len(content), np.int32), np.empty(len(texts), np.int64)
        total = self._library.megalm_bpe_encode(
            self._model, content, ends.ctypes.data, len(texts), ids.ctypes.data, lengths.ctypes.data
        )
        return ids[:total], lengths


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
        log.info("texts that a model normalizes are encoded more slowly: %s", error)
        return False
    return True


@functools.cache
def _compiled() -> Any:
    library = ctypes.CDLL(str(plain_library("bpe", default_cache())))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.megalm_bpe_new.restype = pointer
    library.megalm_bpe_new.argtypes = [ctypes.c_char_p, pointer, pointer, pointer, number, pointer, ctypes.c_int32]
    library.megalm_bpe_delete.restype, library.megalm_bpe_delete.argtypes = None, [pointer]
    library.megalm_bpe_encode.restype = number
    library.megalm_bpe_encode.argtypes = [pointer, ctypes.c_char_p, pointer, number, pointer, pointer]
    return library
