"""`megalm kernels`: build the fused kernels ahead of time, or say what a run would use."""

import argparse
import contextlib
import subprocess
from pathlib import Path

from megalm.config.paths import path_argument
from megalm.errors import PlatformError
from megalm.kernels.building.places import default_cache
from megalm.kernels.building.plain import PLAIN, plain_library


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `megalm kernels`."""
    parser.add_argument("action", choices=("build", "show"), help="build and check them, or say what a run would use")
    place = "default: $XDG_CACHE_HOME/megalm/kernels, or ~/.cache/megalm/kernels"
    parser.add_argument("--cache", type=path_argument, metavar="DIR", help=place)


def run(arguments: argparse.Namespace) -> int:
    """Print one line for this machine's CPU, or why there is no library; one more for GPUs where torch has CUDA.

    Raises:
        PlatformError: `build` could not.
    """
    import torch

    from megalm.kernels.building import library

    cache = None if arguments.cache is None else Path(arguments.cache)
    if arguments.action == "build":
        # who wants one of these says what it does without, and why
        with contextlib.suppress(OSError, RuntimeError, subprocess.SubprocessError):
            for name in PLAIN:
                plain_library(name, default_cache())
    loaded = library.load("auto", cache_folder=cache)
    if loaded.path is None and arguments.action == "build":
        raise PlatformError(f"no fused kernels, runs use the {loaded.reason}")
    print(f"kernels: {loaded.reason}" + (f" ({loaded.path})" if loaded.path else ""))
    if torch.cuda.is_available():
        print(f"kernels on GPUs: {library.load('auto', 'cuda', cache).reason}")
    elif torch.version.cuda is not None:  # a login node: the library is for machines that have what this one lacks
        print(f"kernels on GPUs: {library.without_cuda() or 'compiled; no CUDA device is here to check them on'}")
    return 0
