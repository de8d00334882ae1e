"""Compilers, flags and commands that turn csrc/ into one shared library, and the key under which it is cached.

With a CUDA build of torch and its nvcc the library holds the kernels for GPUs too, registered for CUDA tensors.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from megalm.kernels.building.places import SOURCES, find_cxx
from megalm.storage.faults import reason_of

COMPILE_TIMEOUT_S = 300.0
"""One source file that takes longer is given up."""
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror=return-type", "-Wno-psabi")
# the compiler's own vector headers trip these two (GCC bug 105593)
_QUIET = ("-Wno-uninitialized", "-Wno-maybe-uninitialized")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_INSTRUCTION_SETS = {"generic": (), "avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": (*_AVX512, "-mavx512bf16")}
ARCHITECTURES = ("arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]")
"""Code for A100 and H100 (and their minor versions), and PTX that the driver compiles for what came later."""


def nvcc_flags(architectures: Sequence[str] = ARCHITECTURES) -> tuple[str, ...]:
    """How nvcc compiles, for these."""
    general = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra")
    return (*general, *(word for one in architectures for word in ("-gencode", one)))


NVCC_FLAGS = nvcc_flags()
_TORCH = Path(torch.__file__).parent
_NVCC_PLACES = ("nvcc", "/usr/local/cuda/bin/nvcc")


class BuildError(Exception):
    """No library can be made, and why, in one line."""


@dataclass(frozen=True)
class Toolchain:
    """A C++ compiler, and NVIDIA's where the library is to hold kernels for GPUs."""

    cxx: str
    nvcc: str | None = None

    @classmethod
    def find(cls, cxx: str | None = None) -> "Toolchain":
        """The named compiler, or the first of c++, g++ and clang++ on the search path; nvcc if torch has CUDA.

        Raises:
            BuildError: there is none.
        """
        if cxx is not None and shutil.which(cxx) is None:
            raise BuildError(f"the compiler {cxx} is not on the search path")
        found = cxx or find_cxx()
        if found is None:
            raise BuildError("there is no C++ compiler (c++, g++ or clang++) on the search path")
        return cls(str(shutil.which(found)), find_nvcc() if no_cuda() is None else None)

    def key(self) -> str:
        """Hash of everything that the library depends on: sources, flags, compilers, torch, machine."""
        parts = [
            torch.__version__,
            platform.machine(),
            *_version(self.cxx),
            *(_version(self.nvcc) if self.nvcc else ()),
        ]
        # sources and torch count by what they say, not by where they are
        for command in self._commands(Path("out")):
            parts.append(" ".join(command).replace(str(SOURCES), "csrc").replace(str(_TORCH), "torch"))
        digest = hashlib.sha256("\n".join(parts).encode())
        for path in sorted(SOURCES.iterdir()):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()[:24]

    def build(self, folder: Path) -> Path:
        """Compile and link inside `folder`; returns the library there.

        Raises:
            BuildError: a compiler failed; its first error is in the text.
        """
        *compile_commands, link = self._commands(folder)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2) as pool:
            list(pool.map(_run, compile_commands))
        _run(link)
        return Path(link[-1])

    def _commands(self, folder: Path) -> list[list[str]]:
        """One command per object file, then the link; longest first, so that the cores end together."""
        include = ["-isystem", str(_TORCH / "include")]
        commands: list[list[str]] = []

        def add(compiler: list[str], source: Path, label: str) -> None:
            commands.append([*compiler, "-c", str(source), "-o", str(folder / f"{source.stem}.{label}.o")])

        def included(sources: Sequence[Path]) -> list[str]:
            return [word for source in sources for word in ("-include", str(source))]

        if self.nvcc:
            for source in sorted(SOURCES.glob("*_cuda.cu")):
                add([self.nvcc, *NVCC_FLAGS, "-ccbin", self.cxx], source, "device")
        # the bindings of all operators are one object: torch's headers take longer to read than they do
        include += included(sorted(SOURCES.glob("*_bindings.cpp")))
        with_cuda = ["-DMEGALM_WITH_CUDA"] if self.nvcc else []
        add([self.cxx, *_FLAGS, *_QUIET, *with_cuda, *include], SOURCES / "library.cpp", "any")
        # so are, for each instruction set, the kernels: half the time goes into the compiler's own vector headers
        kernels = sorted(SOURCES.glob("*_cpu.cpp"))
        for label, flags in reversed(self._instruction_sets().items() if kernels else ()):
            isa = [*flags, f"-DMEGALM_ISA={label}"]
            add([self.cxx, *_FLAGS, *_QUIET, *isa, *included(kernels[:-1])], kernels[-1], label)
        objects = [command[-1] for command in commands]
        libraries = [f"-L{_TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
        # nvcc links its run time statically: the library loads on machines without a GPU too
        linker = [self.nvcc, "-ccbin", self.cxx] if self.nvcc else [self.cxx]
        commands.append([*linker, "-shared", *objects, *libraries, "-o", str(folder / "libmegalm.so")])
        return commands

    def _instruction_sets(self) -> dict[str, tuple[str, ...]]:
        """Copies of the CPU kernels: any x86-64 machine may run what another built."""
        if platform.machine() == "x86_64":
            return _INSTRUCTION_SETS
        return {"generic": ()}


def find_nvcc() -> str | None:
    """NVIDIA's compiler, on the search path or where its installer puts it."""
    return next(filter(None, map(shutil.which, _NVCC_PLACES)), None)


def no_cuda() -> str | None:
    """Why this toolchain builds no kernels for GPUs; None: it does."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    nvcc = find_nvcc()
    if nvcc is None:
        return f"there is no nvcc on the search path (torch has CUDA {torch.version.cuda})"
    found = re.search(r"release (\d+)\.", _version(nvcc)[1])
    if found is None or found[1] != torch.version.cuda.split(".")[0]:
        release = found[1] if found else "unknown"
        return f"{nvcc} is CUDA {release} and torch CUDA {torch.version.cuda}; they need the same major version"
    return None


def _version(compiler: str) -> tuple[str, str]:
    answer = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return (compiler, answer.stdout)


def _run(command: list[str]) -> None:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{Path(command[0]).name} took more than {COMPILE_TIMEOUT_S:.0f} s on {command[-3]}") from None
    except OSError as error:
        raise BuildError(f"{command[0]} does not start: {reason_of(error, command[0])}") from None
    if answer.returncode:
        lines = [line for line in answer.stderr.splitlines() if "error" in line] or answer.stderr.splitlines()
        reason = lines[0] if lines else f"exit code {answer.returncode}"
        raise BuildError(f"{Path(command[0]).name} failed: {reason}")
