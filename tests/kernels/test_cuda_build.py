"""The CUDA sources without a GPU: nvcc compiles them for every architecture, and the library with them loads here."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kernels.cached import cached
from kernels.with_nvcc import CUDA_SOURCES, NEWEST, NVCC, STRICT, compile_with_nvcc, compiled, spills

from megalm.kernels.building import library, toolchain
from megalm.kernels.building.toolchain import ARCHITECTURES, Toolchain

LACKING = "nvcc" if NVCC is None else None if any(map(shutil.which, ("c++", "g++", "clang++"))) else "C++ compiler"
needs_nvcc = pytest.mark.skipif(LACKING is not None, reason=f"there is no {LACKING}: the CUDA sources are not compiled")
pytestmark = pytest.mark.timeout(900)  # half a minute of two free cores


@pytest.fixture(scope="module")
def linked() -> Path:
    """The library with the CUDA kernels."""
    tools = Toolchain(Toolchain.find().cxx, NVCC)

    def make(folder):
        *others, link = [command for command in tools._commands(folder) if not command[-1].endswith(".device.o")]
        quick = [["-O0" if word == "-O3" else word for word in command] for command in others]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(toolchain._run, quick))
        toolchain._run([*(word for word in link if not word.endswith(".device.o")), str(compiled() / "all.o")])
        return folder / "libmegalm.so"

    return cached("cuda-linked", [str(NVCC), *toolchain.NVCC_FLAGS, *STRICT, tools.key()], make)


@needs_nvcc
@pytest.mark.parametrize(
    "architectures", [NEWEST, pytest.param(ARCHITECTURES, marks=pytest.mark.long)], ids=["sm_90", "all"]
)
def test_they_compile_without_warnings_and_spills(architectures: tuple[str, ...]) -> None:
    log = (compiled(architectures) / "log").read_text()
    for architecture in ("sm_80", "sm_90")[-len(architectures) :]:
        assert log.count(f"for '{architecture}'") >= len(CUDA_SOURCES)
    assert not spills(log)


@pytest.mark.long
@needs_nvcc
def test_spills_and_warnings_are_seen(tmp_path):
    source = tmp_path / "spill_cuda.cu"
    body = "".join(f"  v[{i}] = p[{i} * stride];\n" for i in range(200))
    use = "".join(f"  p[{i} * stride + 1] = v[{i}] * v[(threadIdx.x, {199 - i})];\n" for i in range(200))
    source.write_text(
        "__global__ void __launch_bounds__(1024) crowded(float* p, int stride) {\n"
        f"  float v[200];\n{body}  __syncthreads();\n{use}}}\n".replace("(threadIdx.x, ", "(")
    )
    code, log = compile_with_nvcc([source], tmp_path / "a.o")
    assert code == 0, log
    assert len(spills(log)) == 2
    source.write_text("__global__ void kernel(float* p) { int unused; p[0] = 1; }\n")
    code, log = compile_with_nvcc([source], tmp_path / "a.o")
    assert code != 0
    assert "unused" in log


@pytest.mark.long
@needs_nvcc
def test_the_library_with_cuda_kernels_loads_and_registers(linked):
    """All that a machine without CUDA can run of it: CPU numbers are right, CUDA tensors have their kernels."""
    code = (
        "import sys, torch; from megalm.kernels import registration, support\n"
        "torch.ops.load_library(sys.argv[1]); registration.register()\n"
        "print(registration.first_failure(), support._has_cuda_kernels())"
    )
    shown = subprocess.run([sys.executable, "-c", code, str(linked)], capture_output=True, text=True, timeout=120)
    assert shown.stdout.split() == ["None", "True"], shown.stderr


@pytest.mark.parametrize(
    ("cuda", "nvcc", "reason"),
    [
        (None, "release 13.0", "this torch is built without CUDA"),
        ("13.0", None, r"there is no nvcc on the search path \(torch has CUDA 13\.0\)"),
        ("12.8", "release 13.0", "nvcc is CUDA 13 and torch CUDA 12.8; they need the same major version"),
        ("13.2", "release 13.0", None),
    ],
)
def test_why_there_are_no_cuda_kernels(tmp_path, monkeypatch, cuda, nvcc, reason):
    compiler = tmp_path / "nvcc"
    compiler.write_text(f"#!/bin/sh\necho Cuda compilation tools, {nvcc}, V{nvcc}\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(toolchain, "_NVCC_PLACES", (str(compiler) if nvcc else os.devnull,))
    found = toolchain.no_cuda()
    assert (found is None) if reason is None else re.search(reason, found)
    assert (Toolchain.find("sh").nvcc is None) == (reason is not None)
    if reason is not None:
        library._load_cuda_once.cache_clear()
        loaded = library.load("auto", "cuda", tmp_path)
        library._load_cuda_once.cache_clear()
        assert re.match(f"torch reference: no fused kernels for CUDA: .*{reason}", loaded.reason)
