"""The CUDA sources, compiled for the CPU by the emulator's header, as kernels that CPU tensors can be sent to."""

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from kernels.cached import cached

from megalm.kernels.building.toolchain import SOURCES, Toolchain

EMULATOR = Path(__file__).parent / "emulator"
# -O1: most of the time goes into the compiler
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
INCLUDE = ['-DMEGALM_EMULATOR="emulator.h"', "-I", str(SOURCES), "-I", str(EMULATOR)]


@cache
def build() -> Path:
    """A shared library of every `*_cuda.cu`."""
    cxx = Toolchain.find().cxx

    def make(folder: Path) -> Path:
        # as one source: reading headers takes most of the time
        sources = [word for file in sorted(SOURCES.glob("*_cuda.cu")) for word in ("-include", str(file))]
        command = [cxx, *FLAGS, *INCLUDE, "-shared", *sources, str(EMULATOR / "table.cpp")]
        answer = subprocess.run([*command, "-o", str(folder / "emulated.so")], capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
        return folder / "emulated.so"

    return cached("emulated", [cxx, *FLAGS], make)


@contextmanager
def live(fused: Path, emulated: Path) -> Iterator[None]:
    """While it lasts, the operators of the library `fused` run the kernels of `emulated` for CPU tensors."""
    library = ctypes.CDLL(str(fused))
    library.megalm_set_emulator.argtypes = [ctypes.c_void_p]
    library.megalm_set_emulator(ctypes.cast(ctypes.CDLL(str(emulated)).emulated_kernel, ctypes.c_void_p))
    try:
        yield
    finally:
        library.megalm_set_emulator(None)
