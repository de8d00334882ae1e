"""The preemption drill on a real four-node SLURM: whatever ends a start of the job, the run goes on bit-exact."""

from pathlib import Path

import pytest
from cluster import Cluster
from e2e.launching import run
from jobs import SubmittedJob, submit
from small_job import LAYOUT, STEPS, losses, quiet_environment, write_recipe

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole run without a scheduler and without a stop, at one rank a node."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run(
        "torchrun", "--standalone", "--nproc-per-node", "4", "launch/pretrain_gpt.py", "--config", write_recipe(folder),
        *LAYOUT, "--save", folder / "run", environ=quiet_environment(),
    )  # fmt: skip
    assert done.code == 0, done.output
    return folder / "run"


def test_a_job_that_is_warned_preempted_and_loses_a_node_finishes_with_the_losses_of_an_undisturbed_run(
    cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    answer = submit(
        cluster, "--config", write_recipe(tmp_path), *LAYOUT, "--save", folder, "--nodes", "4", "--gpus-per-node", "1",
        "--time", "20",
    )  # fmt: skip
    job = SubmittedJob(cluster, answer, folder)

    # the warning before the time limit
    job.wait_for_step(5)
    cluster.command("scancel", "--signal", "USR1", job.number)
    job.wait_for_requeue(1)
    warned = checkpoint(folder)
    assert warned >= 5
    assert "SIGUSR1 received" in job.log

    # preemption by a job of a higher partition
    job.wait_for_step(warned + 5)
    cluster.command("sbatch", "--partition=urgent", "--exclusive", "--nodes=4", "--output=/dev/null", "--wrap", "true")
    job.wait_for_requeue(2)
    preempted = checkpoint(folder)
    assert preempted >= warned + 5
    assert "SIGTERM received" in job.log

    # a node dies
    job.wait_for_step(preempted + 5)
    cluster.kill_node("n3")
    job.wait_for_requeue(3)
    cluster.start_node("n3")
    assert job.wait_for_end() == "COMPLETED", job.log
    assert len(losses(folder)) == STEPS
    assert losses(folder) == losses(undisturbed), "bit-equal"
    assert "start 3 (SLURM_RESTART_COUNT), checkpoint step_" in job.log
    assert cluster.processes() == {}, "no orphans"


def checkpoint(folder: Path) -> int:
    """The step of the newest checkpoint."""
    return int((folder / "latest").read_text().removeprefix("step_"))
