"""Document, sample and shuffle index: equal to megatron-core's arrays, and sound for every size."""

import itertools
import types
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megalm.config.data import DataConfig
from megalm.data.samples.gpt_index import (
    SampleIndex,
    build_document_index,
    build_shuffle_index,
    plan_epochs,
    row_dtype,
    shuffle_dtype,
    split_bounds,
)
from megalm.kernels import shuffle

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def all_indices(
    lengths: Any, documents: range, seq_length: int, num_samples: int | None, seed: int, extra: int
) -> tuple[Any, SampleIndex, Any]:
    plan = plan_epochs(int(lengths[documents.start : documents.stop].sum()), num_samples, seq_length, extra)
    random = np.random.RandomState(seed)
    document_index = build_document_index(documents, plan, random)
    sample_index = SampleIndex(lengths, document_index, plan, seq_length, extra)
    return document_index, sample_index, build_shuffle_index(plan, random)


class MegatronTokenizer:
    """The least that megatron-core's GPTDataset asks of a tokenizer."""

    def __init__(self) -> None:
        self.vocab_size, self.eod, self.pad = 1000, 7, -1
        self.unique_identifiers, self.special_tokens_dict = {"class": "test"}, {"eod": 7}


def megatron_dataset(
    megatron: Any, prefix: str, indices: Any, num_samples: int | None, cache: Any, **options: Any
) -> Any:
    config = megatron.gpt_dataset.GPTDatasetConfig(
        blend=([prefix], None), split="1,0,0", path_to_cache=str(cache), tokenizer=MegatronTokenizer(),
        reset_position_ids=False, reset_attention_mask=False, create_attention_mask=False, eod_mask_loss=False,
        **options,
    )  # fmt: skip
    indexed = megatron.indexed_dataset.IndexedDataset(prefix)
    split = megatron.utils.Split.train
    return megatron.gpt_dataset.GPTDataset(indexed, prefix, indices, num_samples, split, config)


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize(
    ("num_samples", "epochs", "separate"),
    [(None, 1, False), (5, 1, False), (60, 2, False), (45, 2, True), (1000, 31, True), (980, 30, False)],
)
def test_all_arrays_and_samples_equal_megatrons(
    megatron: Any, make_dataset: Any, tmp_path: Any, num_samples: int | None, epochs: int, separate: bool, extra: int
) -> None:
    from megalm.data.samples.gpt_dataset import GPTDataset

    lengths = [17, 1, 40, 0, 0, 3, 64, 64, 5, 200, 0, 31, 8, 9, 100]
    indexed = make_dataset(lengths)
    documents = range(2, 15)
    options = {"sequence_length": 16, "random_seed": 1234, "add_extra_token_to_sequence": bool(extra)}
    indices = np.arange(2, 15, dtype=np.int32)
    theirs = megatron_dataset(megatron, indexed.prefix, indices, num_samples, tmp_path / "cache", **options)
    ours = GPTDataset(indexed, documents, 16, num_samples, 1234, extra_tokens=extra)
    assert (ours.plan.num_epochs, ours.plan.separate_last_epoch) == (epochs, separate)
    assert len(ours) == len(theirs)
    for mine, his in [
        (ours.document_index, theirs.document_index),
        (ours.sample_index.as_megatron(), theirs.sample_index),
        (ours.shuffle_index, theirs.shuffle_index),
    ]:
        assert mine.dtype == his.dtype
        np.testing.assert_array_equal(mine, his)
    for k in range(len(ours)):
        np.testing.assert_array_equal(ours[k].tokens[:16], theirs[k]["tokens"].numpy())
        if extra:
            np.testing.assert_array_equal(ours[k].tokens[1:], theirs[k]["labels"].numpy())


lengths_and_docs = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda x: sum(x) > 0)


def megatrons_arrays(
    megatron: Any,
    sizes: Any,
    documents: range,
    seq_length: int,
    num_samples: int | None,
    seed: int,
    extra: int,
    *,
    keep_last_partial: bool = False,
) -> tuple[Any, Any, Any]:
    """Document, sample and shuffle index as megatron-core's GPTDataset builds them, epochs and all, without files."""
    peer = object.__new__(megatron.gpt_dataset.GPTDataset)
    peer.config = types.SimpleNamespace(
        sequence_length=seq_length,
        random_seed=seed,
        add_extra_token_to_sequence=bool(extra),
        drop_last_partial_validation_sequence=not keep_last_partial,
        path_to_cache=None,
        mock=True,
        defer_npy_index_mmap=False,
        fast_cache_load=False,
    )
    peer.dataset = types.SimpleNamespace(sequence_lengths=sizes)
    peer.indices = np.arange(documents.start, documents.stop, dtype=np.int32)
    peer.num_samples, peer.index_split = num_samples, megatron.utils.Split.valid
    arrays: tuple[Any, Any, Any] = peer._build_document_sample_shuffle_indices()
    return arrays


@settings(QUICK, max_examples=500)
@given(
    lengths_and_docs,
    st.integers(0, 5),
    st.integers(1, 50),
    st.none() | st.integers(1, 300),
    st.integers(0, 1),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, shuffle.MIN_SIZE]),
)
def test_random_settings_give_megatrons_arrays(
    megatron: Any,
    lengths: list[int],
    others: int,
    seq_length: int,
    num_samples: int | None,
    extra: int,
    seed: int,
    compiled_from: int,
) -> None:
    """The number of epochs and the separate last one are each side's own finding; both shuffles are tried."""
    sizes = np.asarray([*[9] * others, *lengths], dtype=np.int32)  # the documents of another split come first
    documents = range(others, len(sizes))
    assume(sum(lengths) >= seq_length + extra)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "MIN_SIZE", compiled_from)
        ours, sample_index, order = all_indices(sizes, documents, seq_length, num_samples, seed, extra)
    theirs, rows, peer_order = megatrons_arrays(megatron, sizes, documents, seq_length, num_samples, seed, extra)
    for mine, his in [(ours, theirs), (sample_index.as_megatron(), rows), (order, peer_order)]:
        assert mine.dtype == his.dtype
        np.testing.assert_array_equal(mine, his)
    assert [list(sample_index.pieces(k)) for k in range(len(rows) - 1)] == rebuilt_from(rows, sizes, theirs, extra)


def rebuilt_from(rows: Any, sizes: Any, document_index: Any, extra: int) -> list[list[tuple[int, int, int]]]:
    """The same parts from Megatron's sample index, as its GPTDataset reads them."""
    samples = []
    for (first, start), (last, stop) in itertools.pairwise(rows.tolist()):
        parts = []
        for position in range(first, last + 1):
            document = int(document_index[position])
            offset = start if position == first else 0
            end = stop + extra if position == last else int(sizes[document])
            if end > offset:
                parts.append((document, offset, end - offset))
        samples.append(parts)
    return samples


@QUICK
@given(lengths_and_docs, st.integers(1, 50), st.integers(0, 1))
def test_kept_partial_samples_equal_megatrons(megatron: Any, lengths: list[int], seq_length: int, extra: int) -> None:
    sizes = np.asarray([*lengths, 3], dtype=np.int32)
    documents = range(len(sizes))
    plan = plan_epochs(int(sizes.sum()), None, seq_length, extra, keep_last_partial=True)
    random = np.random.RandomState(1)
    document_index = build_document_index(documents, plan, random)
    assume(sizes[document_index[-1]])  # the peer asserts when the last document is empty
    ours = SampleIndex(sizes, document_index, plan, seq_length, extra).as_megatron()
    theirs, rows, order = megatrons_arrays(
        megatron, sizes, documents, seq_length, None, 1, extra, keep_last_partial=True
    )
    np.testing.assert_array_equal(document_index, theirs)
    np.testing.assert_array_equal(ours, rows)
    np.testing.assert_array_equal(build_shuffle_index(plan, random), order)


def test_a_partial_sample_beyond_float32_is_counted_exactly() -> None:
    tokens = 2**24 * 8 + 2  # one token more than full samples: float32 rounds it away
    assert plan_epochs(tokens, None, 8, 1, keep_last_partial=True).num_samples == 2**24 + 1
    assert plan_epochs(tokens, None, 8, 1).num_samples == 2**24


@QUICK
@given(lengths_and_docs, st.integers(1, 30), st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_each_token_range_is_a_chunk_of_the_stream_and_shuffling_is_a_permutation(
    lengths: list[int], seq_length: int, num_samples: int, seed: int
) -> None:
    sizes = np.asarray(lengths, dtype=np.int32)
    documents, index, order = all_indices(sizes, range(len(sizes)), seq_length, num_samples, seed, 1)
    assert len(order) == index.num_samples >= num_samples
    assert np.array_equal(np.sort(order), np.arange(len(order)))
    counts = np.bincount(documents, minlength=len(sizes))
    assert len(set(counts.tolist())) == 1  # every document once per epoch
    for position in (0, index.num_samples - 1):
        start, stop = index.token_range(position)
        assert (start, stop - start) == (position * seq_length, seq_length + 1)
    if index.num_samples > 3:
        assert np.array_equal(index.rows(1, 3), index.rows()[1:3])


def test_the_last_epoch_is_shuffled_by_itself_when_little_of_it_is_needed() -> None:
    plan = plan_epochs(1001, 120, 10)  # 100 samples an epoch, 20 of the second
    assert (plan.num_epochs, plan.separate_last_epoch, plan.num_samples_before_last) == (2, True, 100)
    order = build_shuffle_index(plan, np.random.RandomState(0))
    assert set(order[:100].tolist()) == set(range(100))
    assert not plan_epochs(1001, 180, 10).separate_last_epoch


def test_many_epochs_are_counted_without_a_loop() -> None:
    assert plan_epochs(2, 10**15, 1).num_epochs == (10**15 + 1) // 2 + 1


def test_large_numbers_take_the_wide_types() -> None:
    assert (shuffle_dtype(2**32 - 3), shuffle_dtype(2**32 - 2)) == (np.uint32, np.int64)
    assert row_dtype(2**31 - 1, 2**31 - 1) == np.int32
    assert row_dtype(2**31, 1) == row_dtype(1, 2**31) == np.int64


def test_the_sample_index_turns_wide_where_megatrons_does(megatron: Any) -> None:
    sizes = np.asarray([2**31 - 2], dtype=np.int32)
    documents = np.tile(np.zeros(1, dtype=np.int32), 3)
    plan = plan_epochs(2**31 - 2, 5, 2**30, 1)
    rows = megatron.helpers.build_sample_idx(sizes, documents, 2**30, 3, 2**31 - 2, True, True)
    np.testing.assert_array_equal(SampleIndex(sizes, documents, plan, 2**30, 1).rows(), rows)


def test_an_epoch_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        plan_epochs(0, 10, 8)


@pytest.mark.parametrize("split", ["969, 30, 1", "1,1,1", "90,10", "1", "0,1", "99.5,0.25,0.25", "0.1,0.2,0.7"])
@pytest.mark.parametrize("num_elements", [1, 2, 3, 5, 10, 25, 250, 1000, 1500, 123457])
def test_split_bounds_equal_megatrons_rounding(megatron: Any, split: str, num_elements: int) -> None:
    blended = megatron.blended_megatron_dataset_config
    matrix = blended.convert_split_vector_to_split_matrix(blended.parse_and_normalize_split(split))
    ours = split_bounds(DataConfig(split=split).split_shares(), num_elements)
    for (start, stop), edges in zip(ours, matrix, strict=True):
        if edges is None:
            assert start == stop
        else:  # as in BlendedMegatronDatasetBuilder._build_megatron_dataset_splits
            assert (start, stop) == tuple(int(round(edge * float(num_elements))) for edge in edges)  # noqa: RUF046


def test_splits_are_consecutive_and_round_half_to_even() -> None:
    assert split_bounds((0.5, 0.5, 0.0), 5) == [(0, 2), (2, 5), (5, 5)]
    assert split_bounds((0.5, 0.5, 0.0), 7) == [(0, 4), (4, 7), (7, 7)]
