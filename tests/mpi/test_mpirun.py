"""Real MPI launchers, each that is installed: the ranks find each other, and end together with the right code."""

import json
import shutil
from pathlib import Path

import pytest

from megalm.testing.processes import quiet_environment, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(200)]
RANK = """
import json, pathlib, sys
from megalm.distributed.environment import prepare_process, read_environment

place = read_environment()
prepare_process(place)
from datetime import timedelta
from megalm.distributed.rendezvous import open_store

store = open_store(place, timedelta(seconds=60))
store.set(f"rank {place.rank}", str(place.local_rank))
store.wait([f"rank {rank}" for rank in range(place.world_size)])
if store.add("seen", 1) == place.world_size:
    store.set("all", "")
store.wait(["all"])
told = [place.launcher, place.rank, place.world_size, place.local_rank, place.local_world_size, place.master_addr]
(pathlib.Path(sys.argv[1]) / f"told{place.rank}").write_text(json.dumps(told))
store.add("left", 1)
while place.is_first and store.add("left", 0) < place.world_size:  # the store is kept by rank 0
    pass
"""


@pytest.fixture(params=["openmpi", "mpich"])
def mpirun(request: pytest.FixtureRequest) -> list[str]:
    """The start of a command line of one MPI for three ranks on this machine."""
    names = {"openmpi": ("mpirun.openmpi", "orterun"), "mpich": ("mpirun.mpich", "mpiexec.hydra")}[request.param]
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"{request.param} is not installed (Debian: {request.param.replace('openmpi', 'openmpi-bin')})")
    if request.param == "mpich":
        return [program, "-n", "3"]
    pytest.importorskip("mpi4py", reason="under OpenMPI the ranks find each other through mpi4py")
    return [program, "-n", "3", "--allow-run-as-root", "--host", "localhost:3", "--bind-to", "none"]


def test_the_ranks_find_each_other(mpirun: list[str], tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    done = run(*mpirun, "python", tmp_path / "rank.py", tmp_path, environ=quiet_environment())
    assert done.code == 0, done.output
    told = [json.loads((tmp_path / f"told{rank}").read_text()) for rank in range(3)]
    assert told == [["mpirun", rank, 3, rank, 3, "127.0.0.1"] for rank in range(3)]


@pytest.mark.long  # under srun and warm ranks: slurm/test_jobs.py, e2e/test_bad_input.py
def test_an_error_is_one_message_and_its_code_is_the_launchers(mpirun: list[str]) -> None:
    wrong = ("launch/pretrain_gpt.py", "--config", "no/such.yaml")
    done = run(*mpirun, "python", *wrong, environ=quiet_environment())
    assert done.code == 2, done.output
    assert len(done.errors) == 1
    assert done.errors[0].startswith("error: --config no/such.yaml cannot be read: No such file or directory")
