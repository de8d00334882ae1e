"""What a training process on a CPU does with memory that it has freed."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of the GNU C library
_NEVER = 2**31 - 1
_LAST_TRIM = 64
"""After this step the blocks have found their places."""


class FreedMemory:
    """Keeps freed memory of this process for its next tensors, where the C library can.

    The GNU C library gives large blocks back to the system at once, and the system fills new ones with zeros, page by
    page, when they are first written: a tenth of a training step of a 124M model, each of whose steps makes and frees
    the same tensors. In the first steps small blocks may settle beside a large one's place, which then is too small for
    it; so the pages of all places that are free are given back a few times, before such places add up.
    """

    def __init__(self, keep: bool) -> None:
        self._library = ctypes.CDLL(None) if keep and sys.platform.startswith("linux") else None
        self._steps = 0
        if self._library is None or not hasattr(self._library, "mallopt"):  # another C library
            self._library = None
            return
        self._library.mallopt(_M_MMAP_MAX, 0)
        self._library.mallopt(_M_TRIM_THRESHOLD, _NEVER)

    @property
    def kept(self) -> bool:
        """Whether it is."""
        return self._library is not None

    def after_step(self) -> None:
        """Call after every training step."""
        self._steps += 1
        if self._library is not None and self._steps <= _LAST_TRIM and self._steps & (self._steps - 1) == 0:
            self._library.malloc_trim(0)
