"""A process group of one inside the test process, and a stored checkpoint of two ranks."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import handmade
import pytest

from megalm.distributed.environment import read_environment
from megalm.distributed.process_group import start_process_group, stop_process_group
from megalm.testing.spawner import run_on_ranks


@pytest.fixture
def _alone() -> Iterator[None]:
    start_process_group(read_environment({}), "gloo", 1.0)
    yield
    stop_process_group()


@pytest.fixture(scope="session")
def _stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("stored") / "run"
    run_on_ranks(2, handmade.save, run, 2)
    return run


@pytest.fixture
def run(_stored: Path, tmp_path: Path) -> Path:
    """A run folder with the checkpoint step_2 of two ranks, to be damaged."""
    return Path(shutil.copytree(_stored, tmp_path / "run"))
