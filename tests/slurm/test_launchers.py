"""One recipe under every launcher, each with the command that users type: the same losses."""

import shutil
import sys
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import LAUNCHED, SubmittedJob, run_on, submit
from nodes import Nodes

from megalm.testing.processes import Finished, quiet_environment, run
from megalm.testing.small_runs import LAYOUT, losses_in_order, write_recipe

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
RANKS = "import os, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: os._exit(1))"
"""The first lines of a rank that ends with 1 where srun ends it, as megalm's do that lose a peer."""


ONE_STAGE = ("--pipeline-model-parallel-size", "1")
"""A rank a node is enough to see a launcher."""


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """The training flags of the undisturbed run, in a folder of their own."""
    return ["--config", str(write_recipe(tmp_path)), *LAYOUT, *LAUNCHED, "--save", str(tmp_path / "run")]


@pytest.mark.long  # one node: e2e/test_documentation.py; the command line for nodes: launching/test_submit.py
def test_deepspeed_with_a_hostfile_of_two_nodes(
    nodes: Nodes, undisturbed: Path, flags: list[str], tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"{address} slots=1\n" for address in nodes.addresses))
    environ = quiet_environment() | nodes.environment | {"DS_ACCELERATOR": "cpu"}
    done = run("launch/hostfile/pretrain_gpt.sh", hosts, *flags, *ONE_STAGE, environ=environ)
    ends_with_like_losses(done, tmp_path, undisturbed)
    assert nodes.processes() == []


@pytest.mark.long  # on two nodes it always runs
def test_mpirun(undisturbed: Path, flags: list[str], tmp_path: Path) -> None:
    pytest.importorskip("mpi4py")
    if shutil.which("mpirun") is None:
        pytest.skip("no mpirun (Debian: openmpi-bin)")
    done = run("launch/mpi/pretrain_gpt.sh", "4", *flags, environ=quiet_environment())
    ends_with_equal_losses(done, tmp_path, undisturbed)


@pytest.mark.long  # one node: mpi/test_mpirun.py
def test_mpirun_on_two_nodes(nodes: Nodes, undisturbed: Path, flags: list[str], tmp_path: Path) -> None:
    pytest.importorskip("mpi4py")
    hosts = {"HOSTS": ",".join(f"{address}:2" for address in nodes.addresses)}
    environ = quiet_environment() | nodes.environment | hosts
    done = run("launch/mpi/pretrain_gpt.sh", "4", *flags, environ=environ)
    ends_with_equal_losses(done, tmp_path, undisturbed)


def test_srun_in_the_shipped_batch_script(
    cluster: Cluster, undisturbed: Path, flags: list[str], tmp_path: Path
) -> None:
    asked = ["--wait", "--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/log", "--time=10"]
    done = run_on(cluster, "sbatch", *asked, "launch/slurm/pretrain_gpt.sbatch", *flags, *ONE_STAGE)
    ends_with_like_losses(Finished(done.code, done.output + (tmp_path / "log").read_text()), tmp_path, undisturbed)


@pytest.mark.parametrize(
    ("end", "code"),
    [("sys.exit(65)", 65), pytest.param("os.kill(os.getpid(), signal.SIGKILL)", 137, marks=pytest.mark.long)],
)
def test_batch_scripts_end_with_the_code_of_the_first_rank_that_fails(
    end: str, code: int, cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "launch").mkdir()
    ranks = f"{RANKS}\nif os.environ['SLURM_PROCID'] == '2': time.sleep(1); {end}\nsignal.pause()\n"
    (tmp_path / "launch" / "pretrain_gpt.py").write_text(ranks)
    asked = ["--wait", "--nodes=2", "--ntasks-per-node=2", f"--output={tmp_path}/log", "--time=10"]
    script = Path("launch/slurm/pretrain_gpt.sbatch").absolute()
    done = run_on(cluster, "sbatch", *asked, f"--chdir={tmp_path}", str(script))
    assert done.code == code, (tmp_path / "log").read_text()
    answer = submit(
        cluster, "--config", write_recipe(tmp_path), "--script", tmp_path / "launch/pretrain_gpt.py", "--save",
        tmp_path / "run", "--nodes", "2", "--ntasks-per-node", "2", "--gpus-per-node", "0", "--time", "10",
    )  # fmt: skip
    job = SubmittedJob(cluster, answer, tmp_path / "run")
    assert job.wait_for_end() == "FAILED"
    assert job.field("ExitCode") == f"{code}:0", job.log


@pytest.mark.long  # the command that it starts: launching/test_submit.py
def test_one_process(undisturbed: Path, tmp_path: Path) -> None:
    flags = ["--config", str(write_recipe(tmp_path)), *LAUNCHED, "--save", str(tmp_path / "run")]
    done = run(sys.executable, "-m", "megalm.cli", "submit", "--launcher", "local", *flags, environ=quiet_environment())
    ends_with_like_losses(done, tmp_path, undisturbed)


def ends_with_like_losses(done: Finished, folder: Path, undisturbed: Path) -> None:
    assert done.code == 0, done.output
    assert losses_in_order(folder / "run") == pytest.approx(losses_in_order(undisturbed), rel=1e-5)


def ends_with_equal_losses(done: Finished, folder: Path, undisturbed: Path) -> None:
    assert done.code == 0, done.output
    assert losses_in_order(folder / "run") == losses_in_order(undisturbed), "bit-equal"
