"""DeepSpeed's CPU Adam, compiled once for each environment, by one process, in bounded time.

DeepSpeed compiles it at first use on every rank at once, guarded by a lock file of torch's that outlives a killed
process: every later run would wait for it for ever. Here one process compiles while the others wait.
"""

import hashlib
import importlib.util
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder
from deepspeed.ops.op_builder.builder import OpBuilder

from megalm.distributed.environment import environment_with
from megalm.engine.deepspeed_patches import know_compiled
from megalm.errors import PlatformError
from megalm.kernels.building.places import user_cache
from megalm.storage.build_once import build_once
from megalm.storage.faults import refused

log = logging.getLogger("megalm")

BUILD_TIMEOUT_S = 900.0
"""Compiling takes 70 s on two idle cores; a slow build host is no reason to fail, a stuck one is."""
_HELD = (
    "another process has been compiling DeepSpeedCPUAdam for {timeout_s:.0f} s and holds {path}; end it and start again"
)
_NAME = "cpu_adam"
_PROGRAM = """
import os, pathlib
from deepspeed.ops.op_builder import CPUAdamBuilder
flags, sources = CPUAdamBuilder.cxx_args, CPUAdamBuilder.sources

def as_one(builder):
    one = pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"], "as_one.cpp")
    one.write_text("".join(f'#include "{builder.deepspeed_src_path(path)}"\\n' for path in sources(builder)))
    return [str(one)]

CPUAdamBuilder.sources = as_one
CPUAdamBuilder.cxx_args = lambda builder: [*flags(builder), "-g0"]
CPUAdamBuilder().load(verbose=False)
"""
"""torch's headers are read once, not for each source, and no names for a debugger are written: a third of the work."""


def build_cpu_adam(cache: Path | None = None) -> type[DeepSpeedCPUAdam]:
    """The optimizer class, with its compiled part at hand; every rank calls it.

    Raises:
        PlatformError: it cannot be compiled here.
    """
    builder = CPUAdamBuilder()
    if _NAME not in OpBuilder._loaded_ops and not _installed():
        library = _library(cache or user_cache() / "deepspeed")
        spec = importlib.util.spec_from_file_location(_NAME, library)
        assert spec is not None, f"{library} is an extension module"
        assert spec.loader is not None, f"{library} is an extension module"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        know_compiled(_NAME, module)
    builder.load(verbose=False)
    kind: type[DeepSpeedCPUAdam] = DeepSpeedCPUAdam
    return kind


def _installed() -> bool:
    """Whether DeepSpeed was installed with its operators compiled (DS_BUILD_CPU_ADAM=1)."""
    from deepspeed.git_version_info import installed_ops

    return bool(installed_ops.get(_NAME, False))


def _library(cache: Path) -> Path:
    """The compiled library of this environment in the folder `cache`; compiled first if it is not there."""
    import deepspeed

    python = sys.implementation.cache_tag
    parts = (torch.__version__, deepspeed.__version__, python, torch.backends.cpu.get_cpu_capability())
    folder = cache / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    library = folder / f"{_NAME}.so"
    try:
        build_once(library, _compile, timeout_s=BUILD_TIMEOUT_S, error=PlatformError, held=_HELD)
    except OSError as error:
        raise refused("write", folder, error, PlatformError, "DeepSpeedCPUAdam is kept there") from None
    return library


def _compile(folder: Path, lock: int) -> Path:
    """The library, compiled in `folder`.

    The compiler inherits the lock: if this process is killed, the next one waits until its compiler is gone too.
    """
    log.info("compiling DeepSpeedCPUAdam, once for this environment: one to three minutes")
    path = f"{Path(sys.executable).parent}{os.pathsep}"  # ninja is there, even if the environment is not activated
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM],
        env=environment_with(TORCH_EXTENSIONS_DIR=str(folder), before_path=path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        pass_fds=[lock],
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=BUILD_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise PlatformError(f"compiling DeepSpeedCPUAdam took more than {BUILD_TIMEOUT_S:.0f} s") from None
    built = next(folder.rglob(f"{_NAME}.so"), None)
    if process.returncode or built is None:
        raise PlatformError(
            f"DeepSpeedCPUAdam, the optimizer of offload_optimizer, cannot be compiled: {_reason(output)}; install a "
            "C++ compiler and ninja, or take offload_optimizer out of the DeepSpeed JSON"
        )
    return built


def _reason(output: str) -> str:
    """The line of a compiler's or Python's output that says what is wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line.lower()), lines[-1] if lines else "no output")
