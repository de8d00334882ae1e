"""What a run's configuration, its checkpoint and its data make together."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megalm import assembly
from megalm.config.merging.load import load_config
from megalm.data.indexed.writer import IndexedDatasetBuilder
from megalm.errors import DataError
from megalm.run_state import Progress, SampleOrder

FLAGS = (
    "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 8 --micro-batch-size 1 --lr 1 --vocab-size 300"
)


@pytest.fixture
def prefix(tmp_path: Any) -> str:
    """80 tokens in ten documents."""
    with IndexedDatasetBuilder(tmp_path / "data", "uint16") as builder:
        builder.add_documents(np.arange(80), np.full(10, 8, dtype=np.int32))
        builder.finalize()
    return str(tmp_path / "data")


def build(prefix: str, flags: str, order: SampleOrder | None = None) -> Any:
    config = load_config([*FLAGS.split(), "--train-data-path", prefix, *flags.split()])
    order = order or SampleOrder(Progress())
    _, stop_sample = assembly.run_end(config, 1, order.progress)
    one_rank: Any = SimpleNamespace(
        groups=SimpleNamespace(data=SimpleNamespace(rank=0, size=1), is_first_with_samples=True),
        device=SimpleNamespace(type="cpu"),
        rank=0,
    )
    return assembly.build_data(config, one_rank, None, order, stop_sample), config


def test_less_data_than_a_global_batch_is_an_error_with_numbers(prefix: str) -> None:
    with pytest.raises(DataError, match=r"has 9 samples of 8 tokens in one epoch, less than one global batch of 10"):
        build(prefix, "--train-iters 5 --global-batch-size 10")
    build(prefix, "--train-iters 5 --global-batch-size 9")


def test_another_batch_size_on_resume_continues_the_samples(prefix: str) -> None:
    first, _ = build(prefix, "--train-iters 10 --global-batch-size 2")
    order = SampleOrder(Progress(step=4, consumed_samples=8), first.train.record(8))
    data, _ = build(prefix, "--train-iters 10 --global-batch-size 6", order)
    assert len(data.train) >= 8 + 6 * 6
    for number in range(8, 18):
        np.testing.assert_array_equal(data.train[number].tokens, first.train[number].tokens)


def test_train_samples_are_counted_over_a_change_of_batch_size(prefix: str) -> None:
    _, config = build(prefix, "--train-samples 24 --global-batch-size 4")
    assert assembly.run_end(config, 1, Progress(step=4, consumed_samples=8)) == (4 + 16 // 4, 24)
    assert assembly.run_end(config, 1, Progress()) == (6, 24)


@pytest.mark.parametrize("length", ["--train-samples 27", "--train-tokens 216", "--train-tokens 223"])
def test_samples_that_do_not_fill_a_step_are_left_over(prefix: str, length: str) -> None:
    _, config = build(prefix, f"{length} --global-batch-size 4")
    assert assembly.run_end(config, 1, Progress()) == (6, 24)
    assert assembly.run_end(config, 1, Progress(step=2, consumed_samples=24)) == (2, 24)
