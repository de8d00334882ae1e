"""The workspace that the end-to-end tests share."""

import pytest

from megalm.testing.small_runs import Workspace


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("workspace"))
    workspace.prepare()
    return workspace
