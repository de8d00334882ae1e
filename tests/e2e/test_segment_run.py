"""A run with segment recurrence, stopped and gone on: loader, memory, evaluation and checkpoint together."""

from pathlib import Path

import numpy as np
import pytest

from megalm.data.indexed.writer import IndexedDatasetBuilder
from megalm.testing import warm
from megalm.testing.processes import Finished
from megalm.testing.small_runs import SCRIPT, metrics

RUN = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --vocab-size 65 --init-method-std 0.2 "
    "--position-embedding-type relative --segment-memory 12 --sampling consecutive --split 80,20,0 "
    "--hidden-dropout 0.1 --micro-batch-size 1 --global-batch-size 4 --train-iters 6 --eval-iters 2 --eval-interval 2 "
    "--lr 0.02 --log-interval 1 --zero-stage 1 --deterministic-mode"
)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """Ten documents of 40 tokens, eight of them for training: nine samples a row."""
    with IndexedDatasetBuilder(tmp_path / "data", "uint16") as builder:
        builder.add_documents(np.random.default_rng(0).integers(0, 65, 400), np.full(10, 40, dtype=np.int32))
        builder.finalize()
    return str(tmp_path / "data")


def train(folder: Path, prefix: str, flags: str = "", ranks: int | None = 2) -> Finished:
    return warm.run(SCRIPT, *RUN.split(), "--data-path", prefix, "--save", folder, *flags.split(), ranks=ranks)


def values(folder: Path, key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in metrics(folder) if key in row}


@pytest.mark.long  # loader: data/samples; memory and checkpoint: checkpoint/test_checkpoint_across_layouts.py
def test_it_goes_on_bit_for_bit_and_with_no_other_number_of_rows(prefix: str, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder, flags in ((whole, ""), (stopped, "--exit-interval 3")):
        done = train(folder, prefix, flags)
        assert done.code == 0, done.output
    refused = train(stopped, prefix, "--global-batch-size 8")
    assert refused.code != 0
    said = "the number of rows that read on (--global-batch-size) is not the one that the run began with (4 became 8)"
    assert refused.output.count(said) == 1, refused.output
    assert "Traceback" not in refused.output
    done = train(stopped, prefix)
    assert done.code == 0, done.output
    for key, count in (("loss", 6), ("grad_norm", 6), ("validation_loss", 3)):
        assert values(stopped, key) == values(whole, key)
        assert len(set(values(whole, key).values())) == count


@pytest.mark.long
def test_it_goes_on_with_other_ranks_and_micro_batches(prefix: str, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder, flags, ranks in (
        (whole, "--hidden-dropout 0", 2),
        (stopped, "--hidden-dropout 0 --exit-interval 2", 4),
        (stopped, "--hidden-dropout 0 --exit-interval 4 --micro-batch-size 4", None),
        (stopped, "--hidden-dropout 0 --zero-stage 3 --micro-batch-size 2 --tensor-model-parallel-size 2", 4),
    ):
        done = train(folder, prefix, flags, ranks)
        assert done.code == 0, done.output
    for key in ("loss", "grad_norm", "validation_loss"):
        assert values(stopped, key) == pytest.approx(values(whole, key), rel=1e-4)
