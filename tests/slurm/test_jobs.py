"""What the jobs of `megalm submit` do besides training: arrays, chains, exit codes, an end without progress; and what a
cluster's user gets wrong.
"""

import glob
import json
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from jobs import SubmittedJob, run_on, submit

from megalm.errors import PlatformError
from megalm.launching.job import EXIT_NO_PROGRESS
from megalm.testing.processes import quiet_environment
from megalm.testing.small_runs import write_recipe

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(200)]
TOLD = ("--script", "tests/slurm/told.py", "--gpus-per-node", "1", "--time", "5")
PROMPT = 'it\'s "a"\n$HOME `date` #x\n#SBATCH --nodes=5'
TRAIN = ("launch/pretrain_gpt.py", "--distributed-timeout-minutes", "0.1")


def told(folder: Path) -> list[dict[str, Any]]:
    path = folder / "told"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_sweep_is_a_run_for_each_combination_whatever_the_names_without_the_users_secrets(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary")
    folder = tmp_path / 'it\'s "50%j" #1'
    answer = submit(
        cluster, "--config", write_recipe(tmp_path), *TOLD, "--save", folder, "--nodes", "2",
        "--sweep", "lr=0.01,0.02", "--sample-prompt", PROMPT,
    )  # fmt: skip
    job = SubmittedJob(cluster, answer, folder)
    job.wait_for_end_of_array()
    logs = shlex.split(answer.output.split("watch   tail -F ")[1].splitlines()[0])[0]
    assert len(glob.glob(glob.escape(str(folder)) + logs.removeprefix(str(folder)))) == 2
    for rate in ("0.01", "0.02"):
        assert len(list((folder / f"lr={rate}/slurm").glob("job_*.rank_*.log"))) == 2
        ranks = sorted(told(folder / f"lr={rate}"), key=lambda line: int(line["rank"]))
        assert [(line["rank"], line["world_size"], line["lr"]) for line in ranks] == [
            (0, 2, float(rate)),
            (1, 2, float(rate)),
        ]
        assert {(line["secret"], line["prompt"]) for line in ranks} == {(None, PROMPT)}


def test_the_jobs_of_a_chain_run_one_after_the_other_whatever_the_end_of_the_one_before(
    cluster: Cluster, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "code").write_text("75")
    answer = submit(
        cluster, "--config", write_recipe(tmp_path), *TOLD, "--save", folder, "--nodes", "1", "--chain", "2"
    )
    first, second = re.findall(r"\d+", answer.output.split("submitted ")[1].split(":")[0])
    assert f"afterany:{first}" in cluster.command("scontrol", "show", "job", second)
    job = SubmittedJob(cluster, answer, folder)
    assert job.wait_for_end() == "FAILED"
    assert job.field("ExitCode") == "75:0"
    job.number = second
    assert job.wait_for_end() == "FAILED"
    assert [line["job"] for line in told(folder)] == [first, second]


def test_a_job_that_starts_again_without_a_new_checkpoint_is_stopped(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "code").write_text("75")
    answer = submit(
        cluster, "--config", write_recipe(tmp_path), *TOLD, "--save", folder, "--nodes", "1", "--max-idle-starts", "1",
        "--fresh",
    )  # fmt: skip
    job = SubmittedJob(cluster, answer, folder)
    assert job.wait_for_end() == "FAILED"
    assert job.field("ExitCode") == f"{EXIT_NO_PROGRESS}:0", job.log
    assert "error: 1 starts in a row made no progress (checkpoint: none)" in job.log
    assert [(line["start"], line["fresh"]) for line in told(folder)] == [("0", True)]


def test_an_error_ends_the_job_with_its_code_and_message(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    answer = submit(
        cluster, "--config", write_recipe(tmp_path), "--save", folder, "--nodes", "2", "--gpus-per-node", "1",
        "--time", "5", "--load", tmp_path / "nowhere", "--finetune",
    )  # fmt: skip
    job = SubmittedJob(cluster, answer, folder)
    assert job.wait_for_end() == "FAILED"
    assert job.field("ExitCode") == "4:0", job.log
    assert re.findall("^error.*", job.log, flags=re.MULTILINE)[-1].startswith("error: "), job.log
    assert str(tmp_path / "nowhere") in job.log


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--partition", "mian"), 'megalm submit: error: --partition mian is unknown; did you mean "main"?'),
        (("--partition", "main,urgnt"), 'megalm submit: error: --partition urgnt is unknown; did you mean "urgent"?'),
        (("--nodes", "6"), "megalm submit: error: --nodes 6 but partition main has 5; ask for at most 5"),
        (
            ("--time", "61"),
            "megalm submit: error: --time 61 but a job of partition main may last 1:00:00; ask for at most that: the "
            "job queues again and the run goes on",
        ),
        (
            ("--cpus-per-task", "5"),
            "megalm submit: error: 1 ranks a node x --cpus-per-task 5 need 5 cores, but the nodes of partition main "
            "have 4; ask for fewer (--ntasks-per-node, --cpus-per-task)",
        ),
    ],
)
def test_what_the_cluster_does_not_have_is_refused_before_anything_is_written(
    words: tuple[str, ...], error: str, cluster: Cluster, tmp_path: Path
) -> None:
    flags = ["--config", write_recipe(tmp_path), *TOLD, "--save", tmp_path / "run", "--global-batch-size", "24"]
    done = submit(cluster, *flags, *words)
    assert (done.code, done.output.strip()) == (2, error)
    assert not (tmp_path / "run").exists()
    assert cluster.command("squeue", "-h") == ""


def test_sbatch_own_refusal_is_one_error(cluster: Cluster, tmp_path: Path) -> None:
    done = submit(
        cluster, "--config", write_recipe(tmp_path), *TOLD, "--save", tmp_path / "run", "--constraint", "no-such"
    )
    assert done.code == PlatformError.exit_code, done.output
    assert done.output.count("error: ") == 2, done.output
    assert "megalm submit: error: sbatch refused (exit code 1): sbatch: error: " in done.output


@pytest.mark.long  # the rule without a scheduler: distributed/test_environment.py
def test_tasks_that_do_not_know_each_other_are_refused_by_one_of_them(cluster: Cluster, tmp_path: Path) -> None:
    alone = [
        "torchrun",
        "--nproc-per-node",
        "1",
        *TRAIN,
        "--config",
        write_recipe(tmp_path),
        "--save",
        tmp_path / "run",
    ]
    done = run_on(cluster, "srun", "--nodes=2", "--ntasks=2", *alone)
    assert done.code != 0
    assert len(done.errors) == 1, done.output
    assert "each run a launcher that knows of GROUP_WORLD_SIZE=1" in done.errors[0]
    assert cluster.processes() == {}


@pytest.mark.long  # the rule: config/test_checks.py; an error under srun: above
def test_a_layout_that_the_tasks_do_not_fill_is_one_error(cluster: Cluster, tmp_path: Path) -> None:
    flags = ["--config", write_recipe(tmp_path), "--save", tmp_path / "run", "--tensor-model-parallel-size", "2"]
    done = run_on(cluster, "srun", "--kill-on-bad-exit=1", "--ntasks=3", sys.executable, *TRAIN, *flags)
    assert done.code != 0
    assert len(done.errors) == 1, done.output
    assert "world 3" in done.errors[0]
    assert cluster.processes() == {}


@pytest.mark.long  # without a scheduler: distributed/test_rendezvous.py
def test_a_taken_port_and_an_address_that_is_not_rank_0_end_the_step(cluster: Cluster, tmp_path: Path) -> None:
    flags = ["--config", write_recipe(tmp_path), "--save", tmp_path / "run"]
    command = ["srun", "--kill-on-bad-exit=1", "--nodes=2", "--ntasks=2", sys.executable, *TRAIN, *flags]
    listener = socket.create_server(("0.0.0.0", 0))
    with listener:
        port = listener.getsockname()[1]
        done = run_on(cluster, "env", "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={port}", *command)
    assert done.code != 0
    assert f"error: port {port} is taken on this machine" in done.output
    done = run_on(cluster, "env", "MASTER_ADDR=192.0.2.1", "MASTER_PORT=9", *command)
    assert done.code != 0
    assert done.errors, done.output
    assert cluster.processes() == {}


def test_an_interrupted_test_run_leaves_nothing(tmp_path: Path) -> None:
    """The fixture itself: killed without a chance to clean up while a job runs."""
    code = (
        "import sys, time; from pathlib import Path; from cluster import *\n"
        "if missing(): sys.exit(0)\n"
        f"c = Cluster(Path({str(tmp_path / 'c')!r})); c.__enter__()\n"
        "c.command('sbatch', '--output=/dev/null', '--wrap', 'srun sleep 300')\n"
        "wait_until(lambda: any('sleep' in words for words in c.processes().values()), 60, 'no job')\n"
        "import os; os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, env=quiet_environment(), timeout=120)
    if done.returncode == 0:
        pytest.skip("no SLURM here")
    assert done.returncode == -9
    from cluster import processes_of, wait_until

    wait_until(lambda: not processes_of(tmp_path / "c"), 20, lambda: str(processes_of(tmp_path / "c")))
