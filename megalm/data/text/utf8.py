"""The length of texts in UTF-8, once for all who want it or the bytes."""

import ctypes
from typing import Any

_as_utf8: Any = ctypes.pythonapi.PyUnicode_AsUTF8AndSize
_as_utf8.restype = ctypes.c_void_p
_as_utf8.argtypes = [ctypes.py_object, ctypes.c_void_p]


def utf8_length(text: str) -> int:
    """Bytes of a text as UTF-8, which Python then keeps with it: `text.encode()` is a copy from here on.

    Raises:
        UnicodeEncodeError: half of a surrogate pair.
    """
    if text.isascii():
        return len(text)
    size = ctypes.c_ssize_t()
    _as_utf8(text, ctypes.byref(size))
    return size.value
