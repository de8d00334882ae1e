"""Tensor and pipeline parallel runs: the user's output, and what a dead process leaves."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megalm.errors import PlatformError
from megalm.testing import warm
from megalm.testing.small_runs import Workspace

pytestmark = pytest.mark.e2e

TP2_PP2 = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")


def reported(output: str) -> tuple[list[float], str]:
    """Losses, and the continued prompt, as they stand on the terminal."""
    losses = [float(number) for number in re.findall(r"lm loss(?: value)?: ([0-9.E+-]+)", output)]
    return losses, re.findall(r" sample at iteration 3 \| (.*)", output)[-1]


def test_four_ranks_report_what_one_process_reports(workspace: Workspace, tmp_path: Path) -> None:
    """Training, evaluation and a sample, which the checkpoint repeats; the micro-batch size follows from the layout."""
    flags = ("--train-iters", "3", "--micro-batch-size", "none", "--attention-dropout", "0", "--hidden-dropout", "0",
             "--sample-prompt", "import os", "--sample-tokens", "5")  # fmt: skip
    alone = workspace.train(*flags, ranks=None)
    assert alone.code == 0, alone.output
    many = workspace.train(*flags, *TP2_PP2, "--save", tmp_path, ranks=4)
    assert many.code == 0, many.output
    assert "8 micro x 1 dp x 2 accumulated" in many.output
    found, expected = reported(many.output), reported(alone.output)
    assert len(expected[0]) == 4
    assert found[0] == pytest.approx(expected[0], rel=2e-6)
    assert found[1] == expected[1]
    later = warm.run("megalm", "generate", "--load", tmp_path, "--prompt", "import os", "--temperature", "0",
                "--max-new-tokens", "5")  # fmt: skip
    assert later.output.splitlines()[0] == found[1]


def test_a_rank_that_dies_ends_the_job_and_leaves_no_process(workspace: Workspace) -> None:
    with workspace.job(*TP2_PP2[2:], "--train-iters", "100000", "--eval-iters", "0") as job:
        job.wait_for("iteration        2/")
        session = os.getsid(job.pids[0])
        os.kill(job.pids[1], signal.SIGKILL)
        assert job.wait(100).code != 0
        until(lambda: not in_session(session))


def test_a_loader_process_that_dies_is_one_error_of_its_rank(workspace: Workspace) -> None:
    with workspace.job("--num-workers", "1", "--train-iters", "100000", "--eval-iters", "0") as job:
        job.wait_for("iteration        2/")
        os.kill(children_of(job.pids[1])[0], signal.SIGKILL)
        done = job.wait(60)
    assert done.code == PlatformError.exit_code, done.output
    assert len(done.errors) == 1, done.output
    assert done.errors[0].startswith("error on rank 1: a data loader process died")
    assert "Traceback" not in done.output


def until(condition, timeout_s: float = 100.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)


def in_session(leader: int) -> list[int]:
    """The living processes of a session."""
    return [int(pid) for pid in pgrep("-s", leader) if "<defunct>" not in command_line(int(pid))]


def children_of(parent: int) -> list[int]:
    """All descendants, parents first."""
    found = [int(pid) for pid in pgrep("-P", parent)]
    return found + [pid for child in found for pid in children_of(child)]


def pgrep(flag: str, number: int) -> list[str]:
    """What pgrep finds."""
    return subprocess.run(["pgrep", flag, str(number)], capture_output=True, text=True, check=False).stdout.split()


def command_line(pid: int) -> str:
    """A process's command line; empty when it is gone."""
    done = subprocess.run(["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return done.stdout.strip()
