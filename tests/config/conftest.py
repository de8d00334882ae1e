"""The smallest command line that is complete, and ways to load and to fail."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megalm.config.merging.load import load_config
from megalm.config.sections import RunConfig
from megalm.errors import ConfigError

MINIMAL = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 4 "
    "--lr 0.001 --train-iters 10 --mock-data"
)


@pytest.fixture
def minimal() -> list[str]:
    """The minimal command line."""
    return MINIMAL.split()


@pytest.fixture
def load() -> Callable[..., RunConfig]:
    """Loads the minimal command line with more arguments after it (text is split at blanks)."""

    def call(*more: str) -> RunConfig:
        return load_config(MINIMAL.split() + [word for text in more for word in text.split()])

    return call


@pytest.fixture
def problems(load: Callable[..., RunConfig]) -> Callable[..., list[str]]:
    """The problems of the minimal command line with more arguments."""

    def call(*more: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(*more)
        return caught.value.problems

    return call


@pytest.fixture
def problem(problems: Callable[..., list[str]]) -> Callable[..., str]:
    """The only problem of the minimal command line with more arguments."""

    def call(*more: str) -> str:
        found = problems(*more)
        assert len(found) == 1, found
        return found[0]

    return call


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Writes a file into the folder that the test runs in; gives its name."""
    monkeypatch.chdir(tmp_path)

    def call(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return name

    return call
