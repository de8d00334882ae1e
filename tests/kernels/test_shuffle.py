"""The compiled shuffle: numpy's order and state for every size, and numpy itself where it cannot be had."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.kernels import shuffle
from megalm.kernels.building import plain
from megalm.storage import build_once

HAS_COMPILER = plain.find_cxx() is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache and a process that has not looked yet."""
    monkeypatch.setattr(shuffle, "MIN_SIZE", 1)
    monkeypatch.setattr(shuffle, "default_cache", lambda: tmp_path / "cache")
    shuffle._compiled.cache_clear()
    yield tmp_path / "cache"
    shuffle._compiled.cache_clear()


def both(sizes: list[int], dtype: Any, seed: int) -> tuple[list[Any], list[Any], bool]:
    """Arrays shuffled one after the other by each, and whether the generators go on alike."""
    ours, theirs = ([np.arange(size, dtype=dtype) for size in sizes] for _ in range(2))
    random, peer = np.random.RandomState(seed), np.random.RandomState(seed)
    for mine, his in zip(ours, theirs, strict=True):
        shuffle.shuffle(random, mine)
        peer.shuffle(his)
    return ours, theirs, bool(random.randint(2**31) == peer.randint(2**31))


@needs_compiler
@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(1, 5000) | st.sampled_from([1023, 1024, 1025, 2048, 2049, 65536, 65537]), max_size=4),
    st.sampled_from([np.int32, np.uint32, np.int64]),
    st.integers(0, 2**32 - 1),
)
def test_order_and_state_are_numpys(sizes: list[int], dtype: Any, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "MIN_SIZE", 1)
        assert shuffle._compiled() is not None
        ours, theirs, alike = both(sizes, dtype, seed)
    assert alike
    for mine, his in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, his)


@needs_compiler
def test_a_large_array_is_shuffled_by_the_compiled_function(monkeypatch: pytest.MonkeyPatch) -> None:
    size = shuffle.MIN_SIZE + 5
    expected = np.arange(size, dtype=np.int32)
    np.random.RandomState(7).shuffle(expected)
    calls, compiled = [], shuffle._compiled()
    assert compiled is not None
    monkeypatch.setattr(shuffle, "_compiled", lambda: lambda *a: (calls.append(a), compiled(*a))[1])
    array = np.arange(size, dtype=np.int32)
    shuffle.shuffle(np.random.RandomState(7), array[:0])  # small ones are numpy's
    shuffle.shuffle(np.random.RandomState(7), array)
    assert len(calls) == 1
    np.testing.assert_array_equal(array, expected)


@needs_compiler
def test_it_is_compiled_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shuffle._compiled() is not None
    assert {path.suffix for path in fresh.iterdir()} == {".so", ".lock", ".sha256"}
    shuffle._compiled.cache_clear()
    monkeypatch.setattr(build_once.os, "replace", pytest.fail)
    assert shuffle._compiled() is not None


@pytest.mark.parametrize(
    ("script", "reason"),
    [(None, "there is no C++ compiler"), ("echo 'x.cpp:3: error: no such thing' >&2; exit 1", "no such thing")],
)
def test_without_a_working_compiler_numpy_shuffles_and_it_is_said_once(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any, script: str | None, reason: str
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *--version*) exit;; esac\n{script}\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(plain, "find_cxx", lambda: script and str(compiler))
    with caplog.at_level(logging.INFO, "megalm"):
        ours, theirs, alike = both([100, 3000], np.int32, 3)
    assert alike
    assert all(map(np.array_equal, ours, theirs))
    assert [reason in record.getMessage() for record in caplog.records] == [True]
    assert not list(fresh.glob("*.so")) if fresh.exists() else True


def test_a_user_without_a_home_gets_numpys(fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(shuffle, "default_cache", nowhere)
    with caplog.at_level(logging.INFO, "megalm"):
        _, _, alike = both([3000], np.int32, 3)
    assert alike
    assert "home directory" in caplog.text


@needs_compiler
def test_another_order_is_refused(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any) -> None:
    sources = tmp_path / "csrc"
    shutil.copytree(plain.SOURCES, sources)
    text = (sources / "shuffle.cpp").read_text()
    (sources / "shuffle.cpp").write_text(text.replace("0x9908b0dfu", "0x9908b0deu"))
    monkeypatch.setattr(plain, "SOURCES", sources)
    ours, theirs, alike = both([3000], np.int64, 3)
    assert alike
    np.testing.assert_array_equal(ours[0], theirs[0])
    assert "another order" in caplog.text
