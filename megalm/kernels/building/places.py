"""Where compiled code comes from and where it is kept; nothing here needs torch."""

import os
import shutil
import tempfile
from pathlib import Path

from megalm.shipped import shipped_folder

SOURCES = shipped_folder() / "csrc"
"""The kernels' sources."""
_COMPILERS = ("c++", "g++", "clang++")


def user_cache() -> Path:
    """What a user has for all checkouts and runs: $XDG_CACHE_HOME/megalm, or ~/.cache/megalm.

    By the rule of XDG a relative path in the variable counts as none. A user without a home, as a container's of a
    number of its own, has a folder beside other temporary files.
    """
    asked, home = Path(os.path.expandvars("$XDG_CACHE_HOME")), os.path.expanduser("~")
    if asked.is_absolute():
        return asked / "megalm"
    return Path(tempfile.gettempdir(), f"megalm-{os.geteuid()}") if home == "~" else Path(home, ".cache", "megalm")


def default_cache() -> Path:
    """Where built kernels are kept."""
    return user_cache() / "kernels"


def find_cxx() -> str | None:
    """The first of the usual C++ compilers on the search path."""
    return next((name for name in _COMPILERS if shutil.which(name)), None)
