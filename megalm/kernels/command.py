"""`megalm kernels`: build the fused kernels ahead of time, or say what a run would use."""

import argparse
from pathlib import Path

from megalm.errors import PlatformError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `megalm kernels`."""
    parser.add_argument("action", choices=("build", "show"), help="build and check them, or say what a run would use")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="default: ~/.cache/megalm/kernels")


def run(arguments: argparse.Namespace) -> int:
    """Print one line: the library and its instruction set, or why there is none.

    Raises:
        PlatformError: `build` could not.
    """
    from megalm.kernels import library  # imports torch

    loaded = library.load("auto", cache_folder=arguments.cache)
    if loaded.path is None and arguments.action == "build":
        raise PlatformError(f"no fused kernels, runs use the {loaded.reason}")
    print(f"kernels: {loaded.reason}" + (f" ({loaded.path})" if loaded.path else ""))
    return 0
