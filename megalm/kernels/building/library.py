"""The compiled kernels: built once for each machine's toolchain, checked, loaded."""

import ctypes
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from megalm.errors import PlatformError
from megalm.kernels.building.places import SOURCES, default_cache
from megalm.kernels.building.toolchain import BuildError, Toolchain, no_cuda
from megalm.storage.build_once import build_once
from megalm.storage.faults import reason_of

log = logging.getLogger("megalm")

Backend = Literal["auto", "fused", "reference"]

LOCK_TIMEOUT_S = 900.0
"""How long a process waits for another one's build."""
_INSTRUCTION_SETS = ("generic vectors", "AVX2", "AVX-512", "AVX-512 with bfloat16")


@dataclass(frozen=True)
class Library:
    """What is live: the fused kernels (a loaded library), or the reference path and why."""

    path: Path | None
    reason: str

    @property
    def fused(self) -> bool:
        """Whether the fused operators can be called."""
        return self.path is not None


def load(backend: Backend = "auto", device_type: str = "cpu", cache_folder: Path | None = None) -> Library:
    """The kernels that `backend` asks for on "cpu" or "cuda"; builds them if this toolchain has not yet.

    `auto` takes the reference path where there is no compiler, the build fails or a kernel gives wrong numbers, and
    says why in `reason`.

    Raises:
        PlatformError: `backend` is "fused" and they cannot be had.
    """
    if backend == "reference":
        return Library(None, "torch reference (--kernels-backend reference)")
    loaded = (_load_once if device_type == "cpu" else _load_cuda_once)(cache_folder or default_cache())
    if backend == "fused" and not loaded.fused:
        raise PlatformError(
            f"kernels_backend=fused but {loaded.reason}; use --kernels-backend auto to train without fused kernels"
        )
    return loaded if loaded.fused else Library(None, f"torch reference: {loaded.reason}")


@cache
def _load_once(folder: Path) -> Library:
    """What this process can have; a failure is not tried again."""
    try:
        return _load(folder)
    except BuildError as error:
        return Library(None, str(error))


def without_cuda() -> str | None:
    """Why libraries that this machine builds hold no CUDA kernels; None: they do."""
    reason = no_cuda()
    return None if reason is None else f"no fused kernels for CUDA: {reason}"


@cache
def _load_cuda_once(folder: Path) -> Library:
    """The same for CUDA devices: what was built for them must give the right numbers on this process's."""
    from megalm.kernels import registration

    reason = without_cuda()
    if reason is not None:
        return Library(None, reason)
    loaded = _load_once(folder)
    if not loaded.fused:
        return loaded
    try:
        wrong = registration.first_failure("cuda")
    except RuntimeError as error:  # no code for this device, or a driver older than nvcc's run time
        return Library(None, f"the CUDA kernels do not run: {str(error).splitlines()[0]}")
    if wrong is not None:
        return Library(None, f"the CUDA kernel {wrong} gives wrong numbers on this device")
    major, minor = torch.cuda.get_device_capability()
    return Library(loaded.path, f"fused, CUDA sm_{major}{minor}")


def _load(folder: Path) -> Library:
    """Build if needed, load, register and check."""
    from megalm.kernels import registration

    path = build(folder)
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise BuildError(f"{path} does not load: {error.__cause__ or error}") from None  # torch hides the loader's word
    registration.register()
    try:
        wrong = registration.first_failure()
    except RuntimeError as error:
        raise BuildError(f"the kernels do not run: {str(error).splitlines()[0]}") from None
    if wrong is not None:
        raise BuildError(f"the kernel {wrong} gives wrong numbers on this machine")
    return Library(path, f"fused, CPU {_INSTRUCTION_SETS[instruction_set(path)]}")


def instruction_set(path: Path, limit: int = -1) -> int:
    """Place in _INSTRUCTION_SETS of the CPU instruction set in use, lowered to `limit` if that is given."""
    return int(ctypes.CDLL(str(path)).megalm_instruction_set(limit))


def build(folder: Path | None = None, cxx: str | None = None) -> Path:
    """The library of this toolchain in the cache `folder`; compiled first if it is not there.

    Raises:
        BuildError: it cannot be made.
    """
    folder = folder or default_cache()
    if not SOURCES.is_dir():
        raise BuildError(f"the kernels' sources are not at {SOURCES}; they come with megalm: install it again")
    toolchain = Toolchain.find(cxx)
    library = folder / f"libmegalm-{toolchain.key()}.so"

    def make(work: Path) -> Path:
        log.info("compiling the fused kernels with %s, once (under a minute)", toolchain.cxx)
        return toolchain.build(work)

    try:
        build_once(library, make, timeout_s=LOCK_TIMEOUT_S, error=BuildError)
    except OSError as error:
        raise BuildError(f"{folder} cannot be written: {reason_of(error, folder)}") from None
    return library
