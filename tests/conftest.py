"""What holds for every test; --all-layouts: every row of the tables of layouts, not only those that always run."""

import pytest
from hypothesis import settings

settings.register_profile("megalm", deadline=None)  # no test asserts a time
settings.load_profile("megalm")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-layouts", action="store_true", help="every row of the tables of layouts, not only those that always run"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # what starts real jobs takes longest: first, so that no test process is left alone with it
    items.sort(key=lambda item: item.get_closest_marker("e2e") is None)
    if config.getoption("--all-layouts"):
        return
    rows = [(item, getattr(item, "callspec", None)) for item in items]
    rare = [item for item, call in rows if call is not None and not getattr(call.params.get("row"), "ci", True)]
    config.hook.pytest_deselected(items=rare)
    items[:] = [item for item in items if item not in rare]
