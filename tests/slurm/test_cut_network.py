"""A network that is cut between two nodes in the middle of a run."""

import subprocess
import sys
from pathlib import Path

import pytest
from cluster import wait_until
from nodes import Nodes

from megalm.errors import PlatformError
from megalm.testing.processes import REPOSITORY, quiet_environment
from megalm.testing.small_runs import write_recipe

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(200), pytest.mark.long]


def test_ranks_that_are_cut_off_end_in_time_and_leave_the_last_checkpoint(nodes: Nodes, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [
        sys.executable, "-u", "launch/pretrain_gpt.py", "--config", str(write_recipe(tmp_path)), "--save", str(folder),
        "--train-iters", "100000", "--lr-decay-iters", "1000", "--save-interval", "2",
        "--pipeline-model-parallel-size", "2", "--distributed-timeout-minutes", "0.25",
    ]  # fmt: skip
    meeting = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "CROSS_SIZE": "2", "MASTER_PORT": "29533"}
    ranks = []
    for rank, inside in enumerate(nodes.inside):
        environ = quiet_environment() | meeting | {"RANK": str(rank), "MASTER_ADDR": nodes.addresses[0]}
        with (tmp_path / f"log{rank}").open("w") as log:
            ranks.append(subprocess.Popen([*inside, *command], cwd=REPOSITORY, env=environ, stdout=log, stderr=log))
    logs = [tmp_path / f"log{rank}" for rank in (0, 1)]
    try:
        wait_until((folder / "latest").exists, 90, lambda: "\n".join(log.read_text() for log in logs))
        nodes.cut(2)
        assert [rank.wait(60) for rank in ranks] == [PlatformError.exit_code] * 2
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        nodes.join(2)
    for number, log in enumerate(logs):
        text = log.read_text()
        assert f"\nerror on rank {number}: another rank did not answer within --distributed-timeout-minutes in " in text
        assert "Traceback" not in text
    step = int((folder / "latest").read_text().removeprefix("step_"))
    assert (folder / f"step_{step}" / "manifest.json").exists()
