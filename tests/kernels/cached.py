"""What tests compile is kept beside the kernels' library: once for each state of the sources, not once a run."""

import hashlib
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from megalm.kernels.building.places import SOURCES, default_cache
from megalm.storage.build_once import build_once


def cached(kind: str, command: Sequence[str], make: Callable[[Path], Path]) -> Path:
    """What `make(folder)` makes of csrc/ and the emulator; `command`: its compiler, and all else that it depends on."""
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256("\n".join([*command, version]).encode())
    for path in sorted([*SOURCES.iterdir(), *(Path(__file__).parent / "emulator").iterdir()]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    target = default_cache() / f"test-{kind}-{digest.hexdigest()[:24]}"
    build_once(target, make, timeout_s=900, error=AssertionError)
    return target
