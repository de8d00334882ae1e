"""How the library is built, cached, shared, refused and reported: real compilers, real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from kernels.fused import LOADED, needs_fused

from megalm.errors import PlatformError
from megalm.kernels import library, self_test, toolchain
from megalm.kernels.toolchain import BuildError, Toolchain

SLOW_COMPILER = """#!/bin/sh
case "$*" in *--version*) echo slow 1.0; exit;; esac
echo compiled >> {log}
sleep {seconds}
for last; do :; done
echo object > "$last"
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A stand-in for the C++ compiler, which notes each call; one source file is enough."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    for name in ("bindings.cpp", "schema.cpp"):
        (sources / name).write_text("// nothing\n")
    path = tmp_path / "bin" / "c++"
    path.parent.mkdir()
    path.write_text(SLOW_COMPILER.format(log=tmp_path / "log", seconds=0.2))
    path.chmod(0o755)
    monkeypatch.setattr(toolchain, "SOURCES", sources)
    monkeypatch.setattr(library, "SOURCES", sources)
    monkeypatch.setattr(toolchain, "_NVCC_PLACES", ())  # nvcc takes real compilers only
    return path


def calls(tmp_path: Path) -> int:
    """How often the stand-in compiled or linked."""
    log = tmp_path / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def builder(tmp_path: Path, compiler: Path) -> subprocess.Popen:
    """A process that builds with the stand-in."""
    code = (
        "import sys; from pathlib import Path; from megalm.kernels import library, toolchain; "
        "toolchain.SOURCES = library.SOURCES = Path(sys.argv[1]); toolchain._NVCC_PLACES = (); "
        "print(library.build(Path(sys.argv[2]), sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "csrc"), str(tmp_path / "cache"), str(compiler)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_one_process_builds_and_the_others_wait(tmp_path, compiler):
    processes = [builder(tmp_path, compiler) for _ in range(3)]
    paths = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(paths) == 1
    assert calls(tmp_path) == 3  # two objects and the link, once


def test_a_killed_build_leaves_nothing_that_loads_and_its_lock_is_free(tmp_path, compiler):
    compiler.write_text(SLOW_COMPILER.format(log=tmp_path / "log", seconds=60))
    process = builder(tmp_path, compiler)
    deadline = time.monotonic() + 60
    while not calls(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert calls(tmp_path)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not list((tmp_path / "cache").glob("*.so"))
    assert list((tmp_path / "cache").glob("*.build"))
    compiler.write_text(SLOW_COMPILER.format(log=tmp_path / "log", seconds=0))
    assert library.build(tmp_path / "cache", str(compiler)).is_file()
    assert not list((tmp_path / "cache").glob("*.build"))


def test_waiting_for_a_build_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "LOCK_TIMEOUT_S", 0.2)
    with (
        library._lock(tmp_path / "lock"),
        pytest.raises(BuildError, match="another process has held"),
        library._lock(tmp_path / "lock"),
    ):
        pytest.fail("the lock was given twice")


def test_the_key_follows_sources_and_compiler(tmp_path, compiler, monkeypatch):
    keys = [Toolchain(str(compiler)).key()]
    (tmp_path / "csrc").rename(tmp_path / "elsewhere")
    monkeypatch.setattr(toolchain, "SOURCES", tmp_path / "elsewhere")
    assert Toolchain(str(compiler)).key() == keys[0], "two checkouts share what they build"
    (tmp_path / "elsewhere").rename(tmp_path / "csrc")
    monkeypatch.setattr(toolchain, "SOURCES", tmp_path / "csrc")
    (tmp_path / "csrc" / "schema.cpp").write_text("// changed\n")
    keys.append(Toolchain(str(compiler)).key())
    compiler.write_text(compiler.read_text().replace("slow 1.0", "slow 1.1"))
    keys.append(Toolchain(str(compiler)).key())
    assert len(set(keys)) == 3
    assert Toolchain(str(compiler)).key() == keys[-1]


def test_a_failing_compiler_is_one_line(tmp_path, compiler):
    compiler.write_text("#!/bin/sh\necho 'a.cpp:3: error: no such thing' >&2\nexit 1\n")
    with pytest.raises(BuildError, match=r"^c\+\+ failed: a\.cpp:3: error: no such thing$"):
        library.build(tmp_path / "cache", str(compiler))
    assert not list((tmp_path / "cache").glob("*.so"))


def test_without_a_compiler_runs_take_the_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    loaded = library.load("auto", cache_folder=tmp_path)
    assert not loaded.fused
    assert loaded.reason == "torch reference: there is no C++ compiler (c++, g++ or clang++) on the search path"
    with pytest.raises(PlatformError, match=r"kernels_backend=fused but there is no C\+\+ compiler"):
        library.load("fused", cache_folder=tmp_path)


def test_asked_for_and_cuda_references_need_no_library(tmp_path):
    assert library.load("reference", cache_folder=tmp_path) == library.Library(
        None, "torch reference (--kernels-backend reference)"
    )
    if toolchain.no_cuda() is None:
        return
    assert library.load("auto", "cuda").reason == (f"torch reference: no fused kernels for CUDA: {toolchain.no_cuda()}")


@needs_fused
def test_a_wrong_kernel_is_refused(tmp_path, monkeypatch):
    assert self_test.first_failure() is None
    monkeypatch.setattr(self_test.rotary, "fused_rotary", lambda x, cos, sin: x * 1.001)
    assert self_test.first_failure() == "rotary"
    monkeypatch.setattr(library, "build", lambda folder: LOADED.path)
    loaded = library.load("auto", cache_folder=tmp_path / "other")
    assert loaded.reason == "torch reference: the kernel rotary gives wrong numbers on this machine"


def test_a_library_that_does_not_load_says_why(tmp_path, monkeypatch):
    broken = tmp_path / "libmegalm.so"
    broken.write_text("no library")
    monkeypatch.setattr(library, "build", lambda folder: broken)
    loaded = library.load("auto", cache_folder=tmp_path)
    assert loaded.reason.startswith(f"torch reference: {broken} does not load: ")
    assert "invalid ELF header" in loaded.reason or "file too short" in loaded.reason


@needs_fused
def test_the_command_says_what_is_live(tmp_path):
    command = [sys.executable, "-m", "megalm.cli", "kernels"]
    shown = subprocess.run([*command, "build"], capture_output=True, text=True, check=True, timeout=250)
    first, *gpus = shown.stdout.splitlines()
    assert first == f"kernels: {LOADED.reason} ({LOADED.path})"
    assert len(gpus) == (torch.version.cuda is not None)
    bare = {"PATH": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    without = subprocess.run([*command, "build"], capture_output=True, text=True, env=bare, timeout=100)
    assert without.returncode == 6
    assert without.stderr.count("\n") == 1
    assert "there is no C++ compiler" in without.stderr
