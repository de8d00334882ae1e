"""One SLURM cluster a test process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing
from jobs import LAUNCHED
from nodes import Nodes, missing_for_nodes

from megalm.testing import warm
from megalm.testing.processes import quiet_environment
from megalm.testing.small_runs import LAYOUT, RANKS, SCRIPT, write_recipe


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    if reason := missing_for_nodes():
        pytest.skip(reason)
    with Nodes(tmp_path_factory.mktemp("nodes") / "nodes") as running:
        yield running


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the launchers start, on four warm ranks and without a scheduler."""
    folder = tmp_path_factory.mktemp("undisturbed")
    flags = ("--config", write_recipe(folder), *LAYOUT, *LAUNCHED, "--save", folder / "run")
    done = warm.run(SCRIPT, *flags, ranks=RANKS, environ=quiet_environment())
    assert done.code == 0, done.output
    return folder / "run"
