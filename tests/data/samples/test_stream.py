"""Samples in file order, permuted by a formula."""

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.config.data import DataConfig
from megalm.data.indexed.reader import IndexedDataset
from megalm.data.loader import MicroBatchSampler
from megalm.data.samples.build import build_datasets
from megalm.data.samples.permutation import KeyedPermutation
from megalm.data.samples.stream import ConsecutiveDataset, StreamDataset
from megalm.errors import DataError


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 10**12))
def test_a_keyed_permutation_is_one(size: int, key: int) -> None:
    permutation = KeyedPermutation(size, key)
    assert sorted(permutation[k] for k in range(size)) == list(range(size))


def test_the_key_decides_and_neighbours_are_spread() -> None:
    size = 10**12
    one, other = KeyedPermutation(size, 1), KeyedPermutation(size, 2)
    places = np.asarray([one[k] for k in range(4000)])
    assert [one[k] for k in range(50)] == [KeyedPermutation(size, 1)[k] for k in range(50)]
    assert [one[k] for k in range(50)] != [other[k] for k in range(50)]
    counts = np.bincount(places * 20 // size, minlength=20)
    chi_square = float(((counts - 200) ** 2 / 200).sum())
    assert chi_square < 50, "20 equal parts get their share (19 degrees of freedom, p = 1e-4)"
    assert abs(float(np.corrcoef(places[:-1], places[1:])[0, 1])) < 0.07
    with pytest.raises(IndexError):
        one[size]


def test_every_sample_of_an_epoch_comes_once_in_file_order_inside(make_dataset: Any) -> None:
    indexed = make_dataset([17, 0, 30, 5, 60, 9], dtype="int32", vocab_size=10**6)
    data = StreamDataset(indexed, range(1, 5), 8, 30, seed=3)
    assert data.samples_per_epoch == 11  # 95 tokens from token 17 on
    firsts = [int(data[k].tokens[0]) for k in range(30)]
    assert sorted(firsts[:11]) == [17 + 8 * k for k in range(11)] == sorted(firsts[11:22])
    assert firsts[:11] != firsts[11:22], "each epoch has its own order"
    for k in (0, 12, 29):
        assert data[k].tokens.tolist() == list(range(firsts[k], firsts[k] + 9))
        assert data[k].tokens.dtype == np.int64
    assert firsts == [int(StreamDataset(indexed, range(1, 5), 8, 10**9, seed=3)[k].tokens[0]) for k in range(30)]
    assert np.array_equal(pickle.loads(pickle.dumps(data))[7].tokens, data[7].tokens)
    with pytest.raises(IndexError):
        data[30]


def test_fewer_tokens_than_a_sample_is_an_error_with_numbers(make_dataset: Any) -> None:
    with pytest.raises(DataError, match=r"2 documents with 8 tokens are less than one sample of 9 tokens"):
        StreamDataset(make_dataset([5, 3]), range(2), 8, None, 0)


def test_a_run_streams_its_splits(make_dataset: Any) -> None:
    prefix = make_dataset([10] * 100).prefix
    data = DataConfig(data_path=prefix, split="90,10,0", sampling="stream")
    built = build_datasets(data, seq_length=8, num_samples=(300, 5, 5), seed=1, vocab_size=1000)
    assert sorted({int(built.train[k].tokens[0]) for k in range(112)}) == list(range(0, 896, 8))
    assert all(built.valid[""][k].tokens[0] >= 900 for k in range(5))
    assert built.test is None


@pytest.mark.parametrize("damage", ["idx", "bin"])
def test_files_that_do_not_fit_are_found_without_a_scan(make_dataset: Any, damage: str) -> None:
    prefix = make_dataset([10, 20]).prefix
    with open(f"{prefix}.{damage}", "r+b") as stream:
        stream.truncate(stream.seek(0, 2) - 2)
    with pytest.raises(DataError, match=f"data.{damage}"):
        IndexedDataset(prefix, scan=False)


def test_the_quick_fingerprint_sees_an_edit_of_either_file(make_dataset: Any) -> None:
    prefix = make_dataset([10, 20]).prefix
    prints = {IndexedDataset(prefix, scan=False).fingerprint()}
    for name in ("idx", "bin"):
        content = bytearray(Path(f"{prefix}.{name}").read_bytes())
        content[-1] ^= 1
        Path(f"{prefix}.{name}").write_bytes(content[:] if name == "bin" else content)
        if name == "idx":
            content[-1] ^= 1
            with pytest.raises(DataError, match="document boundaries"):
                IndexedDataset(prefix, scan=False)
            Path(f"{prefix}.{name}").write_bytes(content)
        prints.add(IndexedDataset(prefix, scan=False).fingerprint())
    assert len(prints) == 2


def test_a_trillion_tokens_open_with_little_memory(tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
    try:
        import dataset as benchmark
    finally:
        sys.path.pop(0)
    benchmark.write_huge(tmp_path / "huge", 10**9, 1000)
    found = benchmark.child("stream", tmp_path / "huge", 10**9)
    assert found["tokens"] == 10**12
    assert found["peak_mb"] < 150


ROWS = 4


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_every_row_reads_on_whoever_takes_it(make_dataset: Any, size: int, micro: int) -> None:
    """Loader and order of samples together: the micro-batch k of a rank goes on where its last one ended."""
    if ROWS % (size * micro):
        return
    data = ConsecutiveDataset(make_dataset([40, 37, 90, 50], dtype="int32", vocab_size=10**6), range(4), 8, 60, ROWS)
    assert data.samples_per_epoch == 24, "27 samples of 217 tokens"
    for rank in range(size):
        sampler = MicroBatchSampler(micro_batch_size=micro, start=0, stop=60, rank=rank, size=size)
        parts = [[int(data[k].tokens[0]) for k in numbers] for numbers in sampler]
        accumulated = ROWS // (size * micro)
        for number, first in enumerate(parts[:accumulated]):
            rows = [(number * size + rank) * micro + row for row in range(micro)]
            assert first == [row * 6 * 8 for row in rows], "each row has a stretch of 6 samples"
            for step, found in enumerate(parts[number::accumulated]):
                assert found == [(start + step * 8) % (24 * 8) for start in first]


def test_an_epoch_of_rows_has_every_sample_once_and_needs_one_for_each(make_dataset: Any) -> None:
    indexed = make_dataset([40, 37, 90, 50], dtype="int32", vocab_size=10**6)
    data = ConsecutiveDataset(indexed, range(4), 8, None, 5)
    assert sorted(int(data[k].tokens[0]) // 8 for k in range(len(data))) == list(range(25))
    with pytest.raises(DataError, match=r"27 samples of 8 tokens, fewer than the 28 rows of a global batch"):
        ConsecutiveDataset(indexed, range(4), 8, None, 28)


def test_training_and_evaluation_have_rows_of_their_own(make_dataset: Any) -> None:
    prefix = make_dataset([40] * 20, dtype="int32", vocab_size=10**6).prefix
    data = DataConfig(data_path=(prefix,), split="50, 50, 0", sampling="consecutive")
    built = build_datasets(data, seq_length=8, num_samples=(12, 6, 0), rows=(4, 3), seed=1, vocab_size=10**6)
    assert [int(built.train[k].tokens[0]) for k in range(8)] == [0, 96, 192, 288, 8, 104, 200, 296]
    assert [int(built.valid[""][k].tokens[0]) - 400 for k in range(6)] == [0, 128, 256, 8, 136, 264]
