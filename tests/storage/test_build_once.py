"""Built once, by one process: several at once, killed builders and their compilers, failures, bounded waiting."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalm.errors import DataError
from megalm.storage.atomic import atomic_write, atomic_write_by_any, open_locked
from megalm.storage.build_once import build_once, locked
from megalm.storage.durable import replace_text
from megalm.storage.lock import hold

BUILDER = """
import os, subprocess, sys, time
from pathlib import Path
from megalm.storage.build_once import build_once
target, log, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
def make(folder):
    with log.open("a") as lines: print(os.getpid(), file=lines)
    (folder / "made").write_text("whole")
    subprocess.run(["sleep", str(seconds)])
    if "fail" in sys.argv: raise ValueError("no such header")
    return folder / "made"
build_once(target, make, timeout_s=60, error=ValueError)
"""


def builder(folder: Path, seconds: float, *options: str) -> subprocess.Popen[str]:
    """A process that builds `folder`/target.so with a compiler that takes so long."""
    command = [sys.executable, "-c", BUILDER, str(folder / "target.so"), str(folder / "log"), str(seconds), *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def builds(folder: Path) -> int:
    """How often it was compiled."""
    log = folder / "log"
    return len(log.read_text().split()) if log.exists() else 0


def wait_for_a_build(folder: Path) -> None:
    """Returns when a builder has started its compiler."""
    deadline = time.monotonic() + 60
    while not builds(folder) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)


def made(folder: Path) -> Path:
    """The content, at once."""
    (folder / "made").write_text("again")
    return folder / "made"


def test_one_process_builds_and_the_others_wait(tmp_path: Path) -> None:
    processes = [builder(tmp_path, 0.5) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert builds(tmp_path) == 1
    assert (tmp_path / "target.so").read_text() == "whole"
    assert {path.name for path in tmp_path.iterdir()} == {"target.so", "target.so.sha256", "target.lock", "log"}


def test_a_failure_is_not_tried_again_by_those_who_waited(tmp_path: Path) -> None:
    processes = [builder(tmp_path, 1.0, "fail") for _ in range(2)]
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert all("ValueError: no such header" in text for text in said)
    assert builds(tmp_path) == 1
    build_once(tmp_path / "target.so", made, timeout_s=1, error=ValueError)  # who comes later tries again
    assert (tmp_path / "target.so").read_text() == "again"
    assert not (tmp_path / "target.failed").exists()


def test_a_killed_build_leaves_nothing_that_loads_and_its_lock_is_free(tmp_path: Path) -> None:
    process = builder(tmp_path, 60)
    wait_for_a_build(tmp_path)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "target.so").exists()
    assert list(tmp_path.glob("*.build"))
    build_once(tmp_path / "target.so", made, timeout_s=5, error=ValueError)
    assert (tmp_path / "target.so").read_text() == "again"
    assert not list(tmp_path.glob("*.build"))


def test_a_folder_can_be_built(tmp_path: Path) -> None:
    for _ in range(2):
        build_once(tmp_path / "kit", lambda folder: made(folder).parent, timeout_s=1, error=ValueError)
    assert (tmp_path / "kit" / "made").read_text() == "again"


def test_waiting_is_bounded(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "lock", 1.0, ValueError),
        pytest.raises(ValueError, match=r"busy for 0 s: .*lock"),
        locked(tmp_path / "lock", 0.2, ValueError, "busy for {timeout_s:.0f} s: {path}"),
    ):
        pytest.fail("the lock was given twice")


@pytest.mark.parametrize("harm", [b"", b"whole but one bit", None])
def test_a_damaged_file_is_made_again(tmp_path: Path, harm: bytes | None) -> None:
    target = tmp_path / "target.so"
    target.write_text("of a version that kept no hash")
    build_once(target, made, timeout_s=1, error=ValueError)
    if harm is None:
        target.with_name("target.so.sha256").unlink()
    else:
        target.write_bytes(harm)
    build_once(target, made, timeout_s=1, error=ValueError)
    assert target.read_text() == "again"
    build_once(target, lambda folder: pytest.fail("it is whole"), timeout_s=1, error=ValueError)


@pytest.mark.parametrize(("mode", "owner"), [(0o777, None), (0o775, None), (0o755, 65534)])
def test_a_folder_that_others_can_write_is_not_used(tmp_path: Path, mode: int, owner: int | None) -> None:
    folder = tmp_path / "cache"
    build_once(folder / "target.so", made, timeout_s=1, error=ValueError)
    folder.chmod(mode)
    if owner is not None:
        if os.geteuid() != 0:
            pytest.skip("only root gives files away")
        os.chown(folder, owner, owner)
    elif mode == 0o775:
        os.chown(folder, -1, 65534 if os.geteuid() == 0 else os.getgid())
    if mode == 0o775 and os.geteuid() != 0:
        pytest.skip("a user's own group may write")
    with pytest.raises(ValueError, match=f"{folder}.* could plant code there"):
        build_once(folder / "target.so", made, timeout_s=1, error=ValueError)


def test_links_that_lie_in_wait_are_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("lock", ".text.tmp", "data.partial"):
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        hold(tmp_path / "lock")
    with pytest.raises(DataError, match=r"data\.partial: .*it is a symbolic link, which is not followed here"):
        open_locked(tmp_path / "data")
    replace_text(tmp_path / "text", "new")
    assert (tmp_path / "text").read_text() == "new"
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o002, 0o664), (0o022, 0o644)])
def test_the_umask_decides_who_reads_what_is_written(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        replace_text(tmp_path / "text", "x")
        replace_text(tmp_path / "secret", "x", mode=0o600)
        with atomic_write_by_any(tmp_path / "any") as stream:
            stream.write(b"x")
        with atomic_write(tmp_path / "one") as stream:
            stream.write(b"x")
        hold(tmp_path / "lock").close()
    finally:
        os.umask(before)
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in ("text", "any", "one", "lock")}
    assert modes == dict.fromkeys(modes, mode)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
