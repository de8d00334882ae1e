"""A stop signal to one rank, in a phase that takes long: the run is saved and ends within seconds, then goes on."""

import os
import signal
import time
from pathlib import Path

from megalm.testing import warm
from megalm.testing.processes import REPOSITORY
from megalm.testing.small_runs import losses_in_order

FLAGS = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --micro-batch-size 1 --lr 1e-3 "
    "--vocab-size 64 --mock-data --kernels-backend reference "
    "--train-iters 4 --eval-interval 2 --save-interval 2 --log-interval 1 --num-workers 0 --fresh"
)
RUN = (REPOSITORY / "launch/pretrain_gpt.py", *FLAGS.split())


def test_a_hangup_in_a_long_evaluation_ends_it_and_the_same_command_goes_on(tmp_path: Path) -> None:
    save = ("--save", tmp_path / "run")
    with warm.Job(*RUN, *save, "--eval-iters", "1000000", ranks=2) as job:
        job.wait_for("saved ")  # before the evaluation, which would not end
        time.sleep(1)
        os.kill(job.pids[1], signal.SIGHUP)
        done = job.wait(120)
    assert done.code == 75
    assert "stopped after step 2: SIGHUP received; run the same command again to continue" in done.output
    with warm.Job(*RUN, *save, "--eval-iters", "1000000", ranks=2) as job:
        job.wait_for("step_4 ")
        os.kill(job.pids[0], signal.SIGTERM)
        assert job.wait(120).code == 75
    assert len(losses_in_order(tmp_path / "run")) == 4
    assert not (tmp_path / "run" / "previous_1").exists()


def until_it_takes_signals(pid: int) -> None:
    """Return when the process has blocked SIGTERM, for the thread that waits for it."""
    bit = 1 << (signal.SIGTERM - 1)
    for _ in range(1000):
        status = Path(f"/proc/{pid}/status").read_text()
        if int(status.partition("SigBlk:")[2].split()[0], 16) & bit:
            return
        time.sleep(0.1)
    raise AssertionError("it does not")


def test_a_signal_while_ranks_are_awaited_ends_with_75(tmp_path: Path) -> None:
    with warm.Job(*RUN, "--save", tmp_path / "run", ranks=2, of_rank={1: warm.OfRank(starts=False)}) as job:
        until_it_takes_signals(job.pids[0])
        os.kill(job.pids[0], signal.SIGTERM)
        done = job.wait(120)
    assert done.code == 75
    assert "before the first step: nothing to save" in done.output
