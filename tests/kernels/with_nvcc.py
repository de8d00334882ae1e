"""nvcc on the CUDA sources, with the flags of the real build and stricter ones."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from kernels.cached import cached

from megalm.kernels.building.toolchain import ARCHITECTURES, NVCC_FLAGS, SOURCES, find_nvcc, nvcc_flags

NVCC = find_nvcc()
NEWEST = ARCHITECTURES[-1:]
"""What always is compiled; the others are the long tests'."""
CUDA_SOURCES = sorted(SOURCES.glob("*_cuda.cu"))
STRICT = ["-Xptxas", "-v", "-Werror", "all-warnings"]


def compile_with_nvcc(sources: list[Path], output: Path, flags: Sequence[str] = NVCC_FLAGS) -> tuple[int, str]:
    """(exit code, everything said) of nvcc with the flags of the real build, stricter; all sources as one.

    Most of the time goes into headers, which are read for the host and for each architecture.
    """
    *others, last = map(str, sources)
    included = [word for source in others for word in ("-include", source)]
    command = [NVCC, *flags, *STRICT, *included, "-c", last, "-o", str(output)]
    answer = subprocess.run(command, capture_output=True, text=True)
    return answer.returncode, answer.stdout + answer.stderr


def spills(log: str) -> list[str]:
    """Kernels whose registers do not suffice, from what ptxas says: they put values into (slow) local memory."""
    kernel, found = "", []
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            kernel = " ".join(entry.groups())
        if (
            amount := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)
        ) and any(int(size) for size in amount.groups()):
            found.append(kernel)
    return found


def compiled(architectures: Sequence[str] = ARCHITECTURES) -> Path:
    """A folder with all CUDA sources as one object, and what nvcc said of them."""
    flags = nvcc_flags(architectures)

    def make(folder: Path) -> Path:
        code, log = compile_with_nvcc(CUDA_SOURCES, folder / "all.o", flags)
        assert code == 0, log
        (folder / "log").write_text(log)
        return folder

    return cached("cuda", [str(NVCC), *flags, *STRICT], make)
