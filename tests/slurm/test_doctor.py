"""`megalm doctor`: a page about this machine, and about the tasks of srun together; its exit code."""

import re
import sys
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import run_on

from megalm.errors import PlatformError
from megalm.testing.processes import quiet_environment, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(200)]
DOCTOR = (sys.executable, "-m", "megalm.cli", "doctor")


@pytest.mark.long  # docs/cluster.md's doctor under srun: test_guide.py
def test_the_tasks_of_srun_compare_what_they_have_and_measure_how_they_talk(cluster: Cluster, tmp_path: Path) -> None:
    done = run_on(cluster, "srun", "--nodes=2", "--ntasks=2", *DOCTOR, "--ranks", "--folder", tmp_path)
    assert done.code == 0, done.output
    assert re.search(r"^megalm doctor: 2 ranks by srun$", done.output, flags=re.MULTILINE), done.output
    for text in ("torch .* on all ranks", "is the same on all ranks", r"32 MiB in [\d.]+ ms, [\d.]+ GiB/s bus",
                 "SLURM .*main"):  # fmt: skip
        assert re.search(text, done.output), done.output
    assert "FAIL" not in done.output
    assert not list(tmp_path.iterdir()), "no probe is left"


def test_a_folder_that_cannot_be_written_fails(tmp_path: Path) -> None:
    done = run(*DOCTOR, "--folder", tmp_path / "absent", environ=quiet_environment())
    assert done.code == PlatformError.exit_code
    assert re.search(r"FAIL folder .*absent", done.output), done.output
    for row in ("megalm", "torch", "deepspeed", "GPU", "C++ compiler", "nvcc", "kernels", "/dev/shm", "open files",
                "network", "ports", "clock", "SLURM", "MPI", "variables"):  # fmt: skip
        assert re.search(rf"^  (ok|warn|FAIL) +{re.escape(row)} ", done.output, flags=re.MULTILINE), row
