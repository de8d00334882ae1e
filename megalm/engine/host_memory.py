"""What a training process on a CPU does with memory that it has freed."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of the GNU C library
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next tensors; whether the C library can.

    The GNU C library gives large blocks back to the system at once, and the system fills new ones with zeros, page by
    page, when they are first written: a tenth of a training step of a 124M model, whose every step makes and frees the
    same tensors. The price is that the process never shrinks, and is up to a fifth larger.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
