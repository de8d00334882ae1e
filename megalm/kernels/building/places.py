"""Where compiled code comes from and where it is kept; nothing here needs torch."""

import shutil
from pathlib import Path

from megalm.shipped import shipped_folder

SOURCES = shipped_folder() / "csrc"
"""The kernels' sources."""
_COMPILERS = ("c++", "g++", "clang++")


def default_cache() -> Path:
    """Where built libraries are kept: one folder for each user, shared by every checkout and run."""
    return Path.home() / ".cache" / "megalm" / "kernels"


def find_cxx() -> str | None:
    """The first of the usual C++ compilers on the search path."""
    return next((name for name in _COMPILERS if shutil.which(name)), None)
