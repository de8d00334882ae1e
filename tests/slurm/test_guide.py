"""The commands of docs/cluster.md that need a cluster run on one, in the order of the text."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import SubmittedJob, run_on

from megalm.testing.processes import BIN, REPOSITORY, quiet_environment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(200)]


def test_from_the_login_node_to_tensorboard(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    text = (REPOSITORY / "docs/cluster.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```slurm\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    commands = [line.replace("/shared", str(tmp_path)) for block in blocks for line in block.splitlines()]
    seen = set()
    for command in commands:
        words = shlex.split(command)
        seen.add(words[0])
        if words[0] == "tensorboard":
            shows_its_address(cluster, words)
            continue
        done = run_on(cluster, *words)
        assert done.code == 0, f"{command}\n{done.output}"
        if "doctor" in words:
            assert re.search(r"^megalm doctor: \d+ ranks by srun$", done.output, flags=re.MULTILINE), done.output
            assert "FAIL" not in done.output
        if "submit" in words:
            job = SubmittedJob(cluster, done, tmp_path / "runs/first")
            assert job.wait_for_end() == "COMPLETED", job.log
            assert f"tail -F {job.run}/slurm/job_{job.number}.log" in done.output
    assert seen == {"srun", "megalm", "squeue", "tensorboard"}
    assert (tmp_path / "runs/first/latest").read_text().strip() == "step_5"


def shows_its_address(cluster: Cluster, words: list[str]) -> None:
    process = subprocess.Popen(
        [str(BIN / words[0]), *words[1:], "--port", "0"], env=quiet_environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        assert any("http://" in line for line in process.stderr)
    finally:
        process.kill()
        process.wait()
