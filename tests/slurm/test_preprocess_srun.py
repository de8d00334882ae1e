"""`srun -n K megalm preprocess --mpi` on a real SLURM: the bytes of one process; a dead rank ends the step."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cluster", reason="no SLURM cluster for tests in this checkout")
pytest.importorskip("mpi4py")
pytestmark = pytest.mark.long  # the same under mpirun: data/preprocess/test_preprocess_mpi.py
FLAGS = ["preprocess", "--input", "in.jsonl", "--tokenizer-type", "ByteLevelTokenizer", "--append-eod"]
DYING = """
import os, signal, sys
from mpi4py import MPI
from megalm.data.preprocess import pipeline
if MPI.COMM_WORLD.rank == 2:
    pipeline.process_unit = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
from megalm.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def srun(cluster: Any) -> list[str]:
    """srun with the PMIx that MPI needs; skips where SLURM cannot load it."""
    base = ["srun", "--mpi=pmix", "-n", "3", "--kill-on-bad-exit=1"]
    tried = subprocess.run([*base, "true"], env=environment(cluster), capture_output=True, text=True, timeout=60)
    if tried.returncode or not shutil.which("mpirun"):
        pytest.skip(f"srun cannot start MPI (Debian: apt install openmpi-bin libpmix-dev): {tried.stderr[:200]}")
    return base


def environment(cluster: Any) -> dict[str, str]:
    return {**os.environ, **cluster.environment}


def test_tasks_of_srun_write_the_bytes_of_one_process(tmp_path: Path, cluster: Any, srun: list[str]) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": f"text {i} " * (i % 30)}) for i in range(30_000)))
    python = [sys.executable, "-m", "megalm.cli"]
    for start, prefix in (([*srun, *python, *FLAGS, "--mpi"], "many"), ([*python, *FLAGS], "one")):
        command = [*start, "--output-prefix", prefix]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(cluster), capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
    for end in ("bin", "idx", "manifest.json"):
        one, many = ((tmp_path / f"{name}_text_document.{end}").read_bytes() for name in ("one", "many"))
        assert one == many


def test_a_dead_task_ends_the_step_and_nothing_is_published(tmp_path: Path, cluster: Any, srun: list[str]) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": f"text {i} " * 20}) for i in range(60_000)))
    (tmp_path / "dying.py").write_text(DYING)
    command = [*srun, sys.executable, "dying.py", *FLAGS, "--mpi", "--output-prefix", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(cluster), capture_output=True, timeout=120)
    assert done.returncode != 0
    assert not list(tmp_path.glob("out_*"))
