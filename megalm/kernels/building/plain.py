"""Libraries of one C++ file and its headers, without torch: compiled in seconds where there is a compiler."""

import hashlib
import platform
import subprocess
from pathlib import Path

from megalm.kernels.building.places import SOURCES, find_cxx
from megalm.storage.build_once import build_once

PLAIN = ("pieces", "shuffle")
"""All of them."""
_COMPILE_TIMEOUT_S = 300.0
_LOCK_TIMEOUT_S = 2 * _COMPILE_TIMEOUT_S
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared", "-fvisibility=hidden")


def plain_library(name: str, folder: Path) -> Path:
    """The library of NAME.cpp and NAME_*.h in csrc for this compiler and machine; compiled if it is not in `folder`.

    Raises:
        OSError: no compiler, no source, a compiler that fails, or a folder that cannot be written.
        subprocess.SubprocessError: the compiler does not say its version, or takes too long.
    """
    compiler, source = find_cxx(), SOURCES / f"{name}.cpp"
    if compiler is None:
        raise OSError("there is no C++ compiler on the search path")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=_COMPILE_TIMEOUT_S)
    headers = [path.read_bytes() for path in sorted(SOURCES.glob(f"{name}_*.h"))]
    made_from = [source.read_bytes(), *headers, version.stdout, " ".join(_FLAGS).encode(), platform.machine().encode()]
    library = folder / f"libmegalm-{name}-{hashlib.sha256(b'|'.join(made_from)).hexdigest()[:24]}.so"

    def make(work: Path) -> Path:
        made = work / "made.so"
        command = [compiler, *_FLAGS, str(source), "-o", str(made)]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)
        if answer.returncode:
            default = f"{compiler} failed with exit code {answer.returncode}"
            raise OSError(next((line for line in answer.stderr.splitlines() if "error" in line), default))
        return made

    build_once(library, make, timeout_s=_LOCK_TIMEOUT_S, error=OSError)
    return library
