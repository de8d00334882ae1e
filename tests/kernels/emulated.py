"""The CUDA sources, compiled for the CPU by the emulator's header, as kernels that CPU tensors can be sent to."""

import ctypes
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from megalm.kernels.toolchain import SOURCES, Toolchain

EMULATOR = Path(__file__).parent / "emulator"
# -O1: most of the time goes into the compiler
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


def build(folder: Path, sources: Path = SOURCES) -> Path:
    """A shared library of every `*_cuda.cu` of `sources`, made in `folder`."""
    cxx = Toolchain.find().cxx
    flags = [*FLAGS, '-DMEGALM_EMULATOR="emulator.h"', "-I", str(sources), "-I", str(EMULATOR)]
    files = [*sorted(sources.glob("*_cuda.cu")), EMULATOR / "table.cpp"]
    objects = [folder / f"{file.stem}.o" for file in files]
    commands = [
        [cxx, *flags, "-x", "c++", "-c", str(file), "-o", str(made)] for file, made in zip(files, objects, strict=True)
    ]
    with ThreadPoolExecutor(2) as pool:
        for answer in pool.map(lambda command: subprocess.run(command, capture_output=True, text=True), commands):
            assert answer.returncode == 0, answer.stderr
    library = folder / "emulated.so"
    subprocess.run([cxx, "-shared", *map(str, objects), "-o", str(library)], check=True)
    return library


@contextmanager
def live(fused: Path, emulated: Path):
    """While it lasts, the operators of the library `fused` run the kernels of `emulated` for CPU tensors."""
    table = ctypes.CDLL(str(emulated)).emulated_kernels
    table.restype = ctypes.c_void_p
    library = ctypes.CDLL(str(fused))
    library.megalm_set_cpu_kernels.argtypes = [ctypes.c_void_p]
    library.megalm_set_cpu_kernels(table())
    try:
        yield
    finally:
        library.megalm_instruction_set(99)  # the widest that this processor has
