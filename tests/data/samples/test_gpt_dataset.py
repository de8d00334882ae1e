"""Numbered samples and the datasets of a run."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalm.config.data import DataConfig
from megalm.data.samples.build import build_datasets
from megalm.data.samples.gpt_dataset import GPTDataset, MockDataset
from megalm.errors import DataError


def test_samples_are_the_shuffled_documents_end_to_end_and_share_one_token(make_dataset: Any) -> None:
    indexed = make_dataset([5, 0, 7, 20, 1])
    data = GPTDataset(indexed, range(5), 4, None, seed=3)
    stream = np.concatenate([indexed[int(document)] for document in data.document_index])
    for k in range(len(data)):
        start = int(data.shuffle_index[k]) * 4
        assert data[k].tokens.dtype == np.int64
        np.testing.assert_array_equal(data[k].tokens, stream[start : start + 5])


def test_the_seed_decides_the_order_alone(make_dataset: Any) -> None:
    indexed = make_dataset([30] * 40)
    first, again, other = (GPTDataset(indexed, range(40), 8, 300, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(first[k].tokens, again[k].tokens) for k in range(300))
    assert any(not np.array_equal(first[k].tokens, other[k].tokens) for k in range(300))


def test_a_kept_partial_sample_is_padded_with_minus_one(make_dataset: Any) -> None:
    data = GPTDataset(make_dataset([6]), range(1), 4, None, 0, keep_last_partial=True)
    samples = sorted(data[k].tokens.tolist() for k in range(len(data)))
    assert samples == [[0, 1, 2, 3, 4], [4, 5, -1, -1, -1]]


def test_fewer_tokens_than_a_sample_is_an_error_with_numbers(make_dataset: Any) -> None:
    with pytest.raises(DataError, match=r"2 documents with 8 tokens are less than one sample of 9 tokens"):
        GPTDataset(make_dataset([5, 3]), range(2), 8, 10, 0)
    assert len(GPTDataset(make_dataset([5, 4], "enough"), range(2), 8, 10, 0)) >= 10


def test_numbers_beyond_the_dataset_are_refused(make_dataset: Any) -> None:
    data = GPTDataset(make_dataset([20]), range(1), 4, None, 0)
    for number in (-1, len(data)):
        with pytest.raises(IndexError):
            data[number]


def test_a_pickled_dataset_gives_the_same_samples(make_dataset: Any) -> None:
    data = GPTDataset(make_dataset([20, 30]), range(2), 4, 50, 0)
    copy = pickle.loads(pickle.dumps(data))
    assert all(np.array_equal(data[k].tokens, copy[k].tokens) for k in range(len(data)))


def test_mock_samples_depend_on_seed_split_and_number_only() -> None:
    data = MockDataset(1000, 64, 1, 100)
    assert np.array_equal(data[7].tokens, MockDataset(1000, 64, 1, 10**9)[7].tokens)
    assert not np.array_equal(data[7].tokens, data[8].tokens)
    assert not np.array_equal(data[7].tokens, MockDataset(1000, 64, 2, 100)[7].tokens)
    assert not np.array_equal(data[7].tokens, MockDataset(1000, 64, 1, 100, split=1)[7].tokens)
    with pytest.raises(IndexError):
        data[100]


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 5, 100, 50257])
def test_mock_tokens_fit_the_vocabulary(vocab_size: int) -> None:
    sample = MockDataset(vocab_size, 512, 5, 3)[2].tokens
    assert sample.shape == (513,)
    assert sample.dtype == np.int64
    assert 0 <= sample.min() <= sample.max() < vocab_size


def test_mock_tokens_are_predictable_to_their_entropy() -> None:
    data = MockDataset(300, 2000, 11, 40)
    counts = np.zeros((300, 300))
    for k in range(40):
        np.add.at(counts, (data[k].tokens[:-1], data[k].tokens[1:]), 1)
    share = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    bits = -(counts * np.log(np.where(share > 0, share, 1))).sum() / counts.sum()
    assert bits == pytest.approx(data.entropy, abs=0.05)
    assert data.entropy == pytest.approx(0.914, abs=0.001)


def build(data: DataConfig, **changes: Any) -> Any:
    options: dict[str, Any] = {"seq_length": 8, "num_samples": (20, 5, 5), "seed": 1, "vocab_size": 1000}
    return build_datasets(data, **options | changes)


def test_splits_are_by_position_and_a_share_of_zero_is_none(make_dataset: Any) -> None:
    indexed = make_dataset([10] * 100)
    built = build(DataConfig(data_path=indexed.prefix, split="90,10"))
    assert built.test is None
    assert documents_of(built.train) == list(range(90))
    assert documents_of(built.valid[""]) == list(range(90, 100))
    assert len(built.train) >= 20


def documents_of(dataset: Any) -> list[int]:
    """The documents that a dataset of one source is made from."""
    (layout,) = dataset.layouts
    return sorted(set(layout.parts[0].document_index.tolist()))


def test_a_split_of_which_nothing_is_wanted_is_none(make_dataset: Any) -> None:
    config = DataConfig(data_path=make_dataset([10] * 100).prefix)
    built = build(config, num_samples=(20, 0, 0))
    assert (built.valid, built.test) == ({}, None)


def test_paths_per_split_use_their_whole_datasets(make_dataset: Any) -> None:
    train, valid = make_dataset([10] * 5, "train"), make_dataset([10] * 3, "valid")
    built = build(DataConfig(train_data_path=train.prefix, valid_data_path=valid.prefix))
    assert (len(documents_of(built.train)), len(documents_of(built.valid[""])), built.test) == (5, 3, None)


def test_mock_data_gives_three_different_datasets() -> None:
    built = build(DataConfig(mock_data=True))
    assert (len(built.train), len(built.valid[""]), len(built.test)) == (20, 5, 5)
    assert not np.array_equal(built.train[0].tokens, built.valid[""][0].tokens)


def test_a_split_that_rounds_to_no_documents_is_an_error(make_dataset: Any) -> None:
    prefix = make_dataset([100] * 20).prefix
    with pytest.raises(DataError, match=r'"999,1" leaves the valid split none of the 20 documents.*5 samples'):
        build(DataConfig(data_path=prefix, split="999,1"))
    assert build(DataConfig(data_path=prefix, split="90,10,0.1")).test is None, "nobody asks for a test of one step"


def test_a_split_smaller_than_a_sample_names_the_split(make_dataset: Any) -> None:
    with pytest.raises(DataError, match=r"valid split of .*1 documents with 3 tokens"):
        build(DataConfig(data_path=make_dataset([300, 3]).prefix, split="50,50"))


def test_ids_beyond_the_vocabulary_are_found_before_training(make_dataset: Any) -> None:
    config = DataConfig(data_path=make_dataset([300]).prefix, split="1")
    with pytest.raises(DataError, match="token id 200 at position 200"):
        build(config, vocab_size=200)


@pytest.mark.parametrize(
    ("given", "meant"),
    [("corpus_text_document.bin", "corpus_text_document"), ("corpus", "corpus_text_document"),
     ("corpus_txt_document", "corpus_text_document")],
)  # fmt: skip
def test_a_wrong_prefix_gets_a_did_you_mean(make_dataset: Any, tmp_path: Path, given: str, meant: str) -> None:
    make_dataset([300], "corpus_text_document")
    with pytest.raises(DataError, match=f"no file .*PREFIX.bin and PREFIX.idx.*did you mean {tmp_path / meant}\\?"):
        build(DataConfig(data_path=str(tmp_path / given)))


def test_a_missing_folder_is_an_error_that_names_both_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file .*/no/data\.bin and no file .*/no/data\.idx"):
        build(DataConfig(data_path=str(tmp_path / "no" / "data")))


def test_another_tokenizer_than_the_datas_is_refused(make_dataset: Any, tmp_path: Path) -> None:
    config = DataConfig(data_path=make_dataset([300]).prefix, split="1")
    build(config, tokenizer_identity="a" * 64)  # Megatron's data has no manifest
    (tmp_path / "data.manifest.json").write_text('{"tokenizer": {"identity": "%s"}}' % ("b" * 64))
    build(config)
    build(config, tokenizer_identity="b" * 64)
    with pytest.raises(DataError, match=r"made with tokenizer b{16}\.\.\., the run's is a{16}"):
        build(config, tokenizer_identity="a" * 64)
    (tmp_path / "data.manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"data\.manifest\.json"):
        build(config)
