"""Byte-pair encoding with the pieces of a sentencepiece model, cut where no piece goes on: csrc/bpe.cpp.

What lies between the cuts is merged once and then looked up, where the library merges each text anew.
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
    """Encodes texts with the normalization and the pieces of one model, in one thread.

    Args:
        pieces: text and score of each piece that text can become, by id.
        byte_ids: ids of the 256 bytes, for what no piece covers; None where the model has none: `unknown` then.
        table: the precompiled_charsmap of its NormalizerSpec.
        trims: its remove_extra_whitespaces.
        prefix: its add_dummy_prefix.

    Raises:
        ValueError: a table that is cut off.
        OSError, RuntimeError, subprocess.SubprocessError: there is no library, and none can be compiled.
    """

    def __init__(
        self,
        pieces: dict[int, tuple[str, float]],
        byte_ids: Sequence[int] | None,
        unknown: int,
        *,
        table: bytes,
        trims: bool,
        prefix: bool,
    ) -> None:
        if table and not 4 <= int.from_bytes(table[:4], "little") <= len(table) - 4:
            raise ValueError("the model's table of characters is cut off")
        self._library = _compiled()
        text, ends = _end_to_end([piece for piece, _ in pieces.values()])
        ids = np.fromiter(pieces, np.int32, len(pieces))
        scores = np.fromiter((score for _, score in pieces.values()), np.float32, len(pieces))
        of_bytes = np.full(256, -1, np.int32) if byte_ids is None else np.asarray(byte_ids, np.int32)
        self._model = self._library.megalm_bpe_new(
            text, ends.ctypes.data, ids.ctypes.data, scores.ctypes.data, len(pieces), of_bytes.ctypes.data, unknown,
            table, len(table), trims, prefix,
        )  # fmt: skip
        weakref.finalize(self, self._library.megalm_bpe_delete, self._model)

    def __call__(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], Int64s]:
        """The ids of all texts back to back, and the number of ids of each text."""
        content, ends = _end_to_end(texts)
        lengths, room = np.empty(len(texts), np.int64), len(content)
        while True:
            ids = np.empty(room, np.int32)
            total = self._library.megalm_bpe_encode(
                self._model, content, ends.ctypes.data, len(texts), ids.ctypes.data, room, lengths.ctypes.data
            )
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
        log.info("texts that a model normalizes are encoded more slowly: %s", error)
        return False
    return True


@functools.cache
def _compiled() -> Any:
    library = ctypes.CDLL(str(plain_library("bpe", default_cache())))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.megalm_bpe_new.restype = pointer
    text, small = ctypes.c_char_p, ctypes.c_int
    library.megalm_bpe_new.argtypes = [
        text, pointer, pointer, pointer, number, pointer, ctypes.c_int32, text, number, small, small,
    ]  # fmt: skip
    library.megalm_bpe_delete.restype, library.megalm_bpe_delete.argtypes = None, [pointer]
    library.megalm_bpe_encode.restype = number
    library.megalm_bpe_encode.argtypes = [pointer, text, pointer, number, pointer, number, pointer]
    return library
