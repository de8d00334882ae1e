"""The index cache: whole entries or none, found again, built again when anything is wrong."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalm.config.data import DataConfig
from megalm.data.samples.build import build_datasets
from megalm.data.samples.gpt_dataset import GPTDataset
from megalm.data.samples.index_cache import IndexCache
from megalm.errors import DataError


def same(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(np.array_equal(one[k].tokens, other[k].tokens) for k in range(len(one)))


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


@pytest.fixture
def indexed(make_dataset: Any) -> Any:
    return make_dataset([9, 30, 17, 5] * 10)


def with_cache(indexed: Any, folder: Path, seed: int = 1, **options: Any) -> GPTDataset:
    return GPTDataset(indexed, range(len(indexed)), 8, 150, seed, cache=IndexCache(folder), **options)


def test_a_cached_index_is_the_built_one_and_is_mapped(indexed: Any, tmp_path: Path) -> None:
    plain = GPTDataset(indexed, range(len(indexed)), 8, 150, 1)
    for _ in range(2):
        cached = with_cache(indexed, tmp_path / "cache")
        assert same(plain, cached)
        assert isinstance(cached.shuffle_index, np.memmap)
        assert not cached.document_index.flags.writeable
    assert len(entries(tmp_path / "cache")) == 4


def test_a_hit_builds_nothing_and_writes_nothing(indexed: Any, tmp_path: Path) -> None:
    cache, built = IndexCache(tmp_path / "cache"), []

    def build() -> Any:
        built.append(1)
        return {"a": np.arange(5), "b": np.ones((2, 3), dtype=np.int16)}

    first = cache.get({"x": 1}, build)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    second = cache.get({"x": 1}, build)
    assert built == [1]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == before
    assert all(np.array_equal(first[name], second[name]) for name in ("a", "b"))
    cache.get({"x": 2}, build)
    assert built == [1, 1]


def test_everything_that_decides_the_order_is_in_the_key(indexed: Any, make_dataset: Any, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with_cache(indexed, folder)
    for number, other in enumerate(
        [
            lambda: with_cache(indexed, folder, seed=2),
            lambda: with_cache(indexed, folder, extra_tokens=0),
            lambda: GPTDataset(indexed, range(1, 40), 8, 150, 1, cache=IndexCache(folder)),
            lambda: GPTDataset(indexed, range(40), 9, 150, 1, cache=IndexCache(folder)),
            lambda: GPTDataset(indexed, range(40), 8, 1500, 1, cache=IndexCache(folder)),
            lambda: GPTDataset(indexed, range(40), 8, None, 1, keep_last_partial=True, cache=IndexCache(folder)),
            lambda: with_cache(make_dataset([9, 30, 17, 5] * 9 + [5, 17, 30, 9], "other"), folder),
        ],
        2,
    ):
        other()
        assert len(entries(folder)) == 4 * number


def test_data_rebuilt_under_the_same_name_has_another_index(
    write_dataset: Any, make_dataset: Any, tmp_path: Path
) -> None:
    before = with_cache(make_dataset([9, 30, 17, 5]), tmp_path / "cache")
    for name in ("bin", "idx"):
        (tmp_path / f"data.{name}").unlink()
    after = make_dataset([30, 9, 5, 17])
    assert same(with_cache(after, tmp_path / "cache"), GPTDataset(after, range(4), 8, 150, 1))
    assert len(before) == len(before.shuffle_index), "mapped files stay as they were"
    assert len(entries(tmp_path / "cache")) == 8


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "json", "empty"])
def test_a_damaged_entry_is_built_again(
    indexed: Any, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = with_cache(indexed, tmp_path / "cache")
    path = next((tmp_path / "cache").glob("*-document_index.npy"))
    if damage in ("cut", "flip"):
        content = bytearray(path.read_bytes())
        content[-3] ^= 4
        path.unlink()  # a mapped file must not change under its readers
        path.write_bytes(content[:-1] if damage == "cut" else content)
    elif damage == "remove":
        path.unlink()
    else:
        next((tmp_path / "cache").glob("*.json")).write_text("{" if damage == "json" else "")
    assert same(with_cache(indexed, tmp_path / "cache"), GPTDataset(indexed, range(40), 8, 150, 1))
    assert ("is built again" in caplog.text) == (damage != "remove")
    caplog.clear()
    assert same(with_cache(indexed, tmp_path / "cache"), plain)
    assert caplog.text == ""


def test_an_entry_that_is_cut_while_it_is_mapped_is_an_error(indexed: Any, make_dataset: Any, tmp_path: Path) -> None:
    """Without the look at its length each of these reads ends the process (SIGBUS)."""
    folder, other = tmp_path / "cache", make_dataset([20] * 40, "other")
    config = DataConfig(data_path=["1", indexed.prefix, "2", other.prefix], split="1,0,0", data_cache_path=str(folder))
    for name in ("document_index", "block_starts", "shuffle_index", "dataset_index"):
        data = build_datasets(config, seq_length=8, num_samples=(100, 0, 0), seed=1, vocab_size=1000).train
        assert data is not None
        assert len(data[3].tokens) == 9
        for path in folder.glob(f"*-{name}.npy"):
            os.truncate(path, 0)
        with pytest.raises(DataError, match=rf"{name}\.npy was cut while in use; start again"):
            [data[number] for number in range(8)]


def test_a_killed_builder_leaves_nothing_that_is_taken_for_an_entry(tmp_path: Path) -> None:
    code = f"""
import os, signal, numpy as np
from megalm.data.samples import index_cache
save = np.save
def dying(stream, values, **options):
    save(stream, values, **options)
    if values.size == 3:
        stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)
np.save = dying
index_cache.IndexCache({str(tmp_path)!r}).get({{"x": 1}}, lambda: {{"a": np.arange(9), "b": np.arange(3)}})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert not list(tmp_path.glob("*.json"))
    built = IndexCache(tmp_path).get({"x": 1}, lambda: {"a": np.arange(9), "b": np.arange(3)})
    assert built["b"].tolist() == [0, 1, 2]
    assert len(list(tmp_path.glob("*.json"))) == 1


def build_and_report(folder: str, gate: Any, results: Any) -> None:
    gate.wait()
    built = []

    def build() -> Any:
        built.append(1)
        return {"a": np.arange(100_000)}

    total = int(IndexCache(folder).get({"x": 1}, build)["a"].sum())
    results.put((len(built), total))


def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    gate, results = context.Barrier(4), context.Queue()
    processes = [
        context.Process(target=build_and_report, args=(str(tmp_path / "cache"), gate, results)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert sum(built for built, _ in found) == 1
    assert {total for _, total in found} == {99_999 * 50_000}


def test_a_folder_that_cannot_be_written_is_an_error_that_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"--data-cache-path"):
        IndexCache(tmp_path / "file" / "cache").get({"x": 1}, lambda: {"a": np.arange(3)})


def test_each_node_may_have_its_own_folder(indexed: Any, tmp_path: Path) -> None:
    config = DataConfig(data_path=indexed.prefix, split="90,10,0", data_cache_path="set below")
    options: dict[str, Any] = {"seq_length": 8, "num_samples": (100, 5, 0), "seed": 1, "vocab_size": 1000}
    nodes = [
        build_datasets(config.model_copy(update={"data_cache_path": str(tmp_path / node)}), **options)
        for node in ("node1", "node2")
    ]
    assert same(nodes[0].train, nodes[1].train)
    assert entries(tmp_path / "node1") == entries(tmp_path / "node2")
    keys = [json.loads(path.read_text())["key"] for path in (tmp_path / "node1").glob("*.json")]
    assert {key["data"] for key in keys} == {indexed.fingerprint()}
