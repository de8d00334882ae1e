"""Ranks of a launcher that is killed end by themselves. With the real launchers, and ranks that do nothing else."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megalm.testing.processes import environment, free_port

pytestmark = pytest.mark.timeout(120)
RANK = """
import os, pathlib, signal, sys, time
from megalm.distributed.environment import read_environment
from megalm.resilience.launcher import watch_launcher

place = read_environment()
told = pathlib.Path(sys.argv[-1])
signal.signal(signal.SIGTERM, lambda *_: ((told / f"stopped{place.rank}").touch(), os._exit(75)))
watch_launcher(place.launcher)
(told / f"up{place.rank}").write_text(str(os.getpid()))
time.sleep(100)
"""
COMMANDS = {
    "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", "PORT"],
    "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", "PORT"],
}


@pytest.mark.parametrize("launcher", ["deepspeed", pytest.param("torchrun", marks=pytest.mark.long)])
def test_ranks_of_a_killed_launcher_are_asked_to_stop(launcher: str, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    words = [word.replace("PORT", str(free_port())) for word in COMMANDS[launcher]]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(
            [*words, tmp_path / "rank.py", tmp_path], env=environment() | {"DS_ACCELERATOR": "cpu"},
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        until(lambda: len(list(tmp_path.glob("up?"))) == 2)
        pids = [int(path.read_text()) for path in tmp_path.glob("up?")]
        time.sleep(1.5)
        assert not list(tmp_path.glob("stopped?")), "not before"
        job.kill()
        job.wait()
        until(lambda: len(list(tmp_path.glob("stopped?"))) == 2, 15)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 15)
    finally:
        subprocess.run(["pkill", "-KILL", "--session", str(job.pid)])


def test_a_rank_started_by_hand_may_outlive_the_shell(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    by_hand = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    shell = f"python {tmp_path}/rank.py {tmp_path} & until [ -s {tmp_path}/up0 ]; do sleep 0.1; done"
    subprocess.run(["bash", "-c", shell], env=environment() | by_hand, check=True)
    pid = int((tmp_path / "up0").read_text())
    try:
        time.sleep(2)
        assert not (tmp_path / "stopped0").exists()
    finally:
        os.kill(pid, signal.SIGKILL)


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    """Return as soon as `holds()`."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)
