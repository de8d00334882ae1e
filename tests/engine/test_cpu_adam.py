"""Compiling DeepSpeed's CPU Adam: once, by one process, bounded, and nothing half-made is ever loaded.

The compiler is replaced by a short program here; tests/storage has several processes that build; the rows with offload
of tests/parity compile and run the real one.
"""

import os
from pathlib import Path

import pytest

from megalm.engine import cpu_adam
from megalm.errors import PlatformError

MAKE = """
import os, pathlib, time
folder = pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"])
with open({log!r}, "a") as log: log.write("compiled\\n")
(folder / "cpu_adam").mkdir()
(folder / "cpu_adam" / "cpu_adam.so").write_text("library")
"""


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The compiler's log."""
    log = tmp_path / "log"
    monkeypatch.setattr(cpu_adam, "_PROGRAM", MAKE.format(log=str(log)))
    return log


def test_what_a_killed_compiler_left_is_thrown_away(compiled: Path, tmp_path: Path) -> None:
    library = cpu_adam._library(tmp_path)
    library.unlink()
    left = library.parent / "cpu_adam.killed.build" / "cpu_adam"
    left.mkdir(parents=True)
    (left / "lock").touch()  # torch's, for which it would wait for ever
    assert cpu_adam._library(tmp_path).read_text() == "library"
    assert not left.parent.exists()


def test_a_compiler_that_fails_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import sys; print('a.cpp:1: error: no such header'); print('ninja: stopped'); sys.exit(1)"
    monkeypatch.setattr(cpu_adam, "_PROGRAM", program)
    with pytest.raises(PlatformError, match=r"cannot be compiled: a.cpp:1: error: no such header; install a C\+\+"):
        cpu_adam._library(tmp_path)


def test_a_stuck_compiler_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_adam, "BUILD_TIMEOUT_S", 0.5)
    pid = tmp_path / "pid"
    program = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    monkeypatch.setattr(cpu_adam, "_PROGRAM", program)
    with pytest.raises(PlatformError, match="took more than"):
        cpu_adam._library(tmp_path)
    if pid.exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)
