"""The preemption drill on a real SLURM: whatever ends a start of the job, the run goes on bit-exact."""

from pathlib import Path

import pytest
from cluster import Cluster
from jobs import SubmittedJob, hold_at, submit

from megalm.testing import warm
from megalm.testing.processes import quiet_environment
from megalm.testing.small_runs import LAYOUT, RANKS, SCRIPT, STEPS, losses_in_order, write_recipe

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]
HELD = ("--script", "tests/slurm/held_gpt.py", "--save-interval", "4")


@pytest.mark.long
def test_a_job_that_reaches_its_limit_is_preempted_and_loses_a_node_ends_with_the_losses_of_an_undisturbed_run(
    cluster: Cluster, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    hold_at(folder, 3)
    answer = submit(
        cluster, "--config", write_recipe(tmp_path), *LAYOUT, *HELD, "--save", folder, "--nodes", "4",
        "--gpus-per-node", "1", "--time", "20",
    )  # fmt: skip
    job = SubmittedJob(cluster, answer, folder)

    # the time limit comes near: SLURM itself looks every 30 s, and warns
    job.wait_for_step(3)
    cluster.command("scontrol", "update", f"JobId={job.number}", "TimeLimit=2")
    job.wait_for_requeue(1)
    assert checkpoint(folder) == 4
    assert "SIGUSR1 received" in job.log
    cluster.command("scontrol", "update", f"JobId={job.number}", "TimeLimit=20")

    # preemption by a job of a higher partition
    job.hold(10)
    job.wait_for_step(10)
    cluster.command("sbatch", "--partition=urgent", "--exclusive", "--nodes=5", "--output=/dev/null", "--wrap", "true")
    job.wait_for_requeue(2)
    assert checkpoint(folder) == 11
    assert "SIGTERM received" in job.log

    # a node dies: nothing is saved, the last checkpoint is whole; another node takes its place
    job.hold(17)
    job.wait_for_step(17)
    nodes = cluster.command("scontrol", "show", "hostnames", job.field("NodeList")).split()
    cluster.kill_node(nodes[2])
    job.wait_for_requeue(3)
    assert checkpoint(folder) == 16
    job.go_on()
    assert job.wait_for_end() == "COMPLETED", job.log
    cluster.start_node(nodes[2])

    flags = ("--config", write_recipe(tmp_path), *LAYOUT, "--save", tmp_path / "undisturbed")
    assert warm.run(SCRIPT, *flags, ranks=RANKS, environ=quiet_environment()).code == 0
    assert losses_in_order(folder) == losses_in_order(tmp_path / "undisturbed"), "bit-equal"
    assert len(losses_in_order(folder)) == STEPS
    assert "start 3 (SLURM_RESTART_COUNT), checkpoint step_16" in job.log
    assert job.field("ExitCode") == "0:0"
    assert cluster.processes() == {}, "no orphans"


@pytest.mark.long  # stops by SLURM: test_jobs.py; what a signal saves: e2e/test_pretrain.py, test_stops.py
def test_requeue_by_hand_goes_on_bit_equal_and_scancel_saves_and_ends(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    hold_at(folder, 3)
    answer = submit(
        cluster, "--config", write_recipe(tmp_path), *HELD, "--save", folder, "--nodes", "2", "--gpus-per-node", "1",
        "--time", "20",
    )  # fmt: skip
    job = SubmittedJob(cluster, answer, folder)
    job.wait_for_step(3)
    cluster.command("scontrol", "requeue", job.number)
    job.wait_for_requeue(1)
    assert checkpoint(folder) == 4
    job.hold(6)
    job.wait_for_step(6)
    cluster.command("scancel", job.number)
    assert job.wait_for_end() == "CANCELLED", job.log
    job.wait_for_processes()
    assert checkpoint(folder) == 7
    assert "end with exit code 75, checkpoint step_7" in job.log
    flags = ("--config", write_recipe(tmp_path), "--save", tmp_path / "undisturbed", "--exit-interval", "7")
    assert warm.run(SCRIPT, *flags, ranks=2, environ=quiet_environment()).code == 0
    assert losses_in_order(folder) == losses_in_order(tmp_path / "undisturbed")


def checkpoint(folder: Path) -> int:
    """The step of the newest checkpoint."""
    return int((folder / "latest").read_text().removeprefix("step_"))
