"""What holds for every test, and which tests share a process of `pytest -n N`, in which order.

--all-layouts: every row of the tables of layouts, not only those that always run.
"""

import gc
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("megalm", deadline=None)  # no test asserts a time
settings.load_profile("megalm")

FIRST = ("slurm", "e2e/test_documentation.py", "e2e", "parity", "kernels", "checkpoint", "planner", "mpi")
"""What starts first: the longest, so that no test process is left alone with it at the end."""
WAITING = ("slurm",)
"""Groups that wait for a scheduler most of the time: of three or more test processes the last begins with them, and
they wait for it."""

TOGETHER = ("slurm", "data/samples", "models/test_h")
"""Files that share what is made once: the cluster, and the imports of Megatron and of transformers."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-layouts", action="store_true", help="every row of the tables of layouts, not only those that always run"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: starts(group_of(item.nodeid)))
    if config.getoption("--all-layouts"):
        return
    rows = [(item, getattr(item, "callspec", None)) for item in items]
    rare = [item for item, call in rows if call is not None and not getattr(call.params.get("row"), "ci", True)]
    config.hook.pytest_deselected(items=rare)
    items[:] = [item for item in items if item not in rare]


def pytest_collection_finish() -> None:
    """What is imported and collected stays for ever: no collection of garbage needs to look at it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out whole groups, in the order of collection; xdist 3.8 sees no mark of a group under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

        def _assign_work_unit(self, node: Any) -> None:
            """Give the process the first group that is for it, or end it."""
            mine = next((group for group in self.workqueue if self._takes(node, group)), None)
            if mine is None:
                node.shutdown()
                return
            self.workqueue.move_to_end(mine, last=False)
            super()._assign_work_unit(node)

        def _takes(self, node: Any, group: str) -> bool:
            return self.numnodes < 3 or group not in WAITING or node.gateway.id == f"gw{self.numnodes - 1}"

    return Groups(config, log)


def group_of(nodeid: str) -> str:
    """Tests of one group run in one process: a file, whose fixtures are made once, or what else is made once."""
    path, _, name = nodeid.removeprefix("tests/").partition("::")
    if path == "parity/test_parity.py" and ": " in name:
        model = name.rpartition(": ")[0]
        return f"{path} {model.rpartition(', ')[2]}"  # one run of one process for each model
    return next((folder for folder in TOGETHER if path.startswith(folder)), path)


def starts(group: str) -> int:
    """The place of a group in the order."""
    return next((place for place, name in enumerate(FIRST) if group.startswith(name)), len(FIRST))
