"""Locks on files: taken once, waited for, said by whom, free when their holder is dead."""

import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megalm import waiting
from megalm.storage.durable import open_kept
from megalm.storage.lock import HeldError, hold, is_still, sign, take, take_alone


def test_a_second_holder_gives_up_at_once_or_after_its_time(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock", "w") as second:
        assert take(first)
        assert not take(second)
        begin = time.monotonic()
        assert not take(second, 0.25)
        assert 0.25 <= time.monotonic() - begin < 5


def test_who_waits_gets_it_when_it_is_free(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock", "w") as second:
        assert take(first)
        timer = threading.Timer(0.2, first.close)
        timer.start()
        assert take(second, math.inf)
        timer.join()


def test_the_holder_is_named(tmp_path: Path) -> None:
    with hold(tmp_path / "lock"), pytest.raises(HeldError, match=f"process {os.getpid()} on "):
        hold(tmp_path / "lock")
    hold(tmp_path / "lock").close()


HOLDER = """
import os, sys, time
from megalm.storage import lock
stream = open(sys.argv[1], "ab")
assert getattr(lock, sys.argv[2])(stream)
worker = os.fork()
if worker == 0:
    time.sleep(60)
print(worker, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("way", "free"), [("take", False), ("take_alone", True)])
def test_a_worker_of_a_dead_holder_holds_on_or_not(tmp_path: Path, way: str, free: bool) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "lock"), way], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    worker = int(holder.stdout.readline())
    again = {"take": take, "take_alone": take_alone}[way]
    try:
        with open(tmp_path / "lock", "ab") as stream:
            assert not again(stream)
            holder.kill()
            holder.wait()
            assert again(stream) == free
    finally:
        os.kill(worker, 9)


def test_a_file_that_got_another_name_is_not_the_one_of_that_name(tmp_path: Path) -> None:
    with open(tmp_path / "a", "w") as stream:
        assert is_still(stream, tmp_path / "a")
        (tmp_path / "a").rename(tmp_path / "b")
        assert not is_still(stream, tmp_path / "a")
        (tmp_path / "a").touch()
        assert not is_still(stream, tmp_path / "a")


def test_who_waits_long_for_a_lock_says_who_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waiting, "SPEAK_AFTER_S", 0.2)
    path = tmp_path / "index.lock"
    with open_kept(path) as first, open_kept(path) as second:  # as all who build and wait open it
        assert take(first)
        sign(first)
        assert not take(second, 0.5)
    said = capsys.readouterr().err
    assert f"waiting for 0 s: another process holds {path} (process {os.getpid()} on " in said
    assert said.count("waiting for") <= 2  # each time the wait has doubled
