"""Compilers, flags and commands that turn csrc/ into one shared library, and the key under which it is cached."""

import hashlib
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
"""The kernels' sources: beside the package in a checkout."""
COMPILE_TIMEOUT_S = 300.0
"""One source file that takes longer is given up."""
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror=return-type", "-Wno-psabi")
# the compiler's own vector headers trip these two (GCC bug 105593)
_QUIET = ("-Wno-uninitialized", "-Wno-maybe-uninitialized")
_INSTRUCTION_SETS = {
    "generic": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
}


class BuildError(Exception):
    """No library can be made, and why, in one line."""


@dataclass(frozen=True)
class Toolchain:
    """A C++ compiler."""

    cxx: str

    @classmethod
    def find(cls, cxx: str | None = None) -> "Toolchain":
        """The named compiler, or the first of c++, g++ and clang++ on the search path.

        Raises:
            BuildError: there is none.
        """
        if cxx is not None and shutil.which(cxx) is None:
            raise BuildError(f"the compiler {cxx} is not on the search path")
        found = cxx or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
        if found is None:
            raise BuildError("there is no C++ compiler (c++, g++ or clang++) on the search path")
        return cls(str(shutil.which(found)))

    def key(self) -> str:
        """Hash of everything that the library depends on: sources, flags, compilers, torch, machine."""
        parts = [torch.__version__, platform.machine(), *_version(self.cxx)]
        parts += [" ".join(map(str, command)) for command in self._commands(Path("out"))]
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
        torch_root = Path(torch.__file__).parent
        include = ["-isystem", str(torch_root / "include")]
        commands: list[list[str]] = []

        def add(compiler: list[str], source: Path, label: str) -> None:
            commands.append([*compiler, "-c", str(source), "-o", str(folder / f"{source.stem}.{label}.o")])

        for name in ("bindings.cpp", "schema.cpp"):
            add([self.cxx, *_FLAGS, *_QUIET, *include], SOURCES / name, "any")
        for label, flags in self._instruction_sets().items():
            for source in sorted(SOURCES.glob("*_cpu.cpp")):
                add([self.cxx, *_FLAGS, *_QUIET, *flags, f"-DMEGALM_ISA={label}"], source, label)
        objects = [command[-1] for command in commands]
        libraries = [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lc10"]
        commands.append([self.cxx, "-shared", *objects, *libraries, "-o", str(folder / "libmegalm.so")])
        return commands

    def _instruction_sets(self) -> dict[str, tuple[str, ...]]:
        """Copies of the CPU kernels: any x86-64 machine may run what another built."""
        if platform.machine() == "x86_64":
            return _INSTRUCTION_SETS
        return {"generic": ()}


def _version(compiler: str) -> tuple[str, str]:
    answer = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return (compiler, answer.stdout)


def _run(command: list[str]) -> None:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{Path(command[0]).name} took more than {COMPILE_TIMEOUT_S:.0f} s on {command[-3]}") from None
    except OSError as error:
        raise BuildError(f"{command[0]} does not start: {error.strerror}") from None
    if answer.returncode:
        lines = [line for line in answer.stderr.splitlines() if "error" in line] or answer.stderr.splitlines()
        reason = lines[0] if lines else f"exit code {answer.returncode}"
        raise BuildError(f"{Path(command[0]).name} failed: {reason}")
