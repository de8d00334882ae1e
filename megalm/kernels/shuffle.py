"""numpy's legacy shuffle, several times as fast: the same generator and swaps, in csrc/shuffle.cpp.

On arrays beyond the processor's cache numpy waits for memory at every swap; compiled, the places are drawn ahead. It is
a library of its own, without torch: compiled in a second, loaded in a millisecond.
"""

import ctypes
import functools
import logging
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.kernels.building.places import default_cache
from megalm.kernels.building.plain import plain_library

log = logging.getLogger("megalm")

MIN_SIZE = 1 << 20
"""Elements from which on it is worth compiling; numpy shuffles fewer in some 20 ms."""
_MAX_SIZE = 1 << 32
"""Beyond it numpy draws numbers of 64 bits."""

Array = npt.NDArray[np.integer[Any]]
Function = Callable[..., int]


def shuffle(random: np.random.RandomState, array: Array) -> None:
    """`random.shuffle(array)` of a one-dimensional array: the same order, the same state of `random` afterwards."""
    able = array.flags.c_contiguous and array.itemsize in (4, 8) and MIN_SIZE <= len(array) <= _MAX_SIZE
    function = _compiled() if able else None
    if function is None:
        random.shuffle(array)
    else:
        _shuffle(function, random, array)


def _shuffle(function: Function, random: np.random.RandomState, array: Array) -> None:
    state: dict[str, Any] = random.get_state(legacy=False)  # type: ignore[assignment]
    words = np.array(state["state"]["key"], dtype=np.uint32)
    position = function(array.ctypes.data, len(array), array.itemsize, words.ctypes.data, state["state"]["pos"])
    state["state"] = {"key": words, "pos": position}
    random.set_state(state)


@functools.cache
def _compiled() -> Function | None:
    """The compiled function, when it can be had and does what numpy does; says in one line why not."""
    try:
        function: Any = ctypes.CDLL(str(plain_library("shuffle", default_cache()))).megalm_shuffle
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: this user has no home folder
        log.info("numpy shuffles the index, which takes some seconds more for large data: %s", error)
        return None
    function.restype = ctypes.c_int
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int]
    if not _is_numpys(function):
        log.warning("numpy shuffles the index: the compiled function gives another order on this machine")
        return None
    compiled: Function = function
    return compiled


def _is_numpys(function: Function) -> bool:
    for start in (np.arange(3000, dtype=np.int32), np.arange(3000, dtype=np.int64)):
        ours, theirs = start.copy(), start.copy()
        random, peer = np.random.RandomState(1), np.random.RandomState(1)
        _shuffle(function, random, ours)
        peer.shuffle(theirs)
        if not np.array_equal(ours, theirs) or random.randint(1 << 31) != peer.randint(1 << 31):
            return False
    return True
