"""How the library is built, cached, refused and reported; `tests/storage` has several processes that build."""

import argparse
import os
from pathlib import Path

import pytest
import torch
from kernels.fused import LOADED, needs_fused

from megalm.errors import PlatformError
from megalm.kernels import registration, rotary
from megalm.kernels.building import command, library, places, toolchain
from megalm.kernels.building.toolchain import BuildError, Toolchain
from megalm.storage.build_once import locked

COMPILER = """#!/bin/sh
case "$*" in *--version*) echo slow 1.0; exit;; esac
echo compiled >> {log}
for last; do :; done
echo object > "$last"
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A stand-in for the C++ compiler, which notes each call; one source file is enough."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "library.cpp").write_text("// nothing\n")
    path = tmp_path / "bin" / "c++"
    path.parent.mkdir()
    path.write_text(COMPILER.format(log=tmp_path / "log"))
    path.chmod(0o755)
    monkeypatch.setattr(toolchain, "SOURCES", sources)
    monkeypatch.setattr(library, "SOURCES", sources)
    monkeypatch.setattr(toolchain, "_NVCC_PLACES", ())  # nvcc takes real compilers only
    return path


def calls(tmp_path: Path) -> int:
    """How often the stand-in compiled or linked."""
    log = tmp_path / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_it_is_compiled_once_in_a_folder_that_goes(tmp_path, compiler):
    path = library.build(tmp_path / "cache", str(compiler))
    assert library.build(tmp_path / "cache", str(compiler)) == path
    assert calls(tmp_path) == 2  # one object, which holds all bindings, and the link
    assert not list((tmp_path / "cache").glob("*.build"))


def test_waiting_for_a_build_is_bounded(tmp_path, compiler, monkeypatch):
    monkeypatch.setattr(library, "LOCK_TIMEOUT_S", 0.2)
    place = tmp_path / f"libmegalm-{Toolchain(str(compiler)).key()}.lock"
    with (
        locked(place, 1.0, BuildError),
        pytest.raises(BuildError, match=f"another process has held {place} for 0 s"),
    ):
        library.build(tmp_path, str(compiler))


def test_the_key_follows_sources_and_compiler(tmp_path, compiler, monkeypatch):
    keys = [Toolchain(str(compiler)).key()]
    (tmp_path / "csrc").rename(tmp_path / "elsewhere")
    monkeypatch.setattr(toolchain, "SOURCES", tmp_path / "elsewhere")
    assert Toolchain(str(compiler)).key() == keys[0], "two checkouts share what they build"
    (tmp_path / "elsewhere").rename(tmp_path / "csrc")
    monkeypatch.setattr(toolchain, "SOURCES", tmp_path / "csrc")
    (tmp_path / "csrc" / "library.cpp").write_text("// changed\n")
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
    assert registration.first_failure() is None
    monkeypatch.setattr(rotary, "fused_rotary", lambda x, cos, sin: x * 1.001)
    assert registration.first_failure() == "rotary"
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
def test_the_command_says_what_is_live(tmp_path, monkeypatch, capsys):
    assert command.run(argparse.Namespace(action="build", cache=None)) == 0
    first, *gpus = capsys.readouterr().out.splitlines()
    assert first == f"kernels: {LOADED.reason} ({LOADED.path})"
    assert len(gpus) == (torch.version.cuda is not None)
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    with pytest.raises(PlatformError, match=r"there is no C\+\+ compiler"):
        command.run(argparse.Namespace(action="build", cache=tmp_path))


@pytest.mark.parametrize(
    ("value", "place"),
    [(None, "{home}/.cache"), ("", "{home}/.cache"), ("relative", "{home}/.cache"), ("/scratch/me", "/scratch/me")],
)
def test_the_cache_is_where_xdg_says(monkeypatch, tmp_path, value, place):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert str(places.default_cache()) == place.format(home=tmp_path) + "/megalm/kernels"


def test_a_user_without_a_home_has_a_cache_as_well(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(places.os.path, "expanduser", lambda path: path)  # so for a number that no user has
    monkeypatch.setattr(places.tempfile, "tempdir", str(tmp_path))
    assert places.default_cache() == tmp_path / f"megalm-{os.geteuid()}" / "kernels"


def test_a_library_that_a_crash_has_cut_is_compiled_again(tmp_path, compiler):
    path = library.build(tmp_path / "cache", str(compiler))
    whole = path.read_bytes()
    for content in (b"", whole[:-1] + b"?"):
        path.write_bytes(content)
        assert library.build(tmp_path / "cache", str(compiler)).read_bytes() == whole
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(BuildError, match="could plant code there"):
        library.build(tmp_path / "cache", str(compiler))
