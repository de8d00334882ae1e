"""A run whose batch size, rates and weight decay change: the same in one process, and stopped and gone on in others.

Only whole runs show that loader, engine, pipeline and resume agree on how many samples a step has.
"""

from pathlib import Path

import pytest

from megalm.testing import warm
from megalm.testing.small_runs import SCRIPT, metrics

RUN = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --vocab-size 65 --mock-data --seed 5 "
    "--micro-batch-size 2 --train-samples 50 --eval-iters 2 --eval-interval 5 --eval-global-batch-size 12 "
    "--lr 0.01 --lr-warmup-fraction 0.15 --min-lr 1e-4 --decoupled-lr 0.03 --weight-decay-incr-style cosine "
    "--start-weight-decay 0.01 --end-weight-decay 0.3 --init-method-xavier-uniform --log-interval 1 "
    "--untie-embeddings-and-output-weights --deterministic-mode"
)
RAMP, STEPS = "--rampup-batch-size 4 4 16 --global-batch-size 8", "--step-batch-size-schedule 0:4,256:12,512:8"
SIZES = {RAMP: [4, 4, 4, 4, 8, 8, 8, 8], STEPS: [4, 4, 4, 4, 12, 12, 8]}


def train(folder: Path, *flags: str, ranks: int | None = None) -> str:
    """Start or go on; what it printed."""
    done = warm.run(SCRIPT, *RUN.split(), *(word for text in flags for word in text.split()), "--save", folder,
                    ranks=ranks)  # fmt: skip
    assert done.code == 0, done.output
    return done.output


@pytest.mark.parametrize("batch", [RAMP, pytest.param(STEPS, marks=pytest.mark.long)])
def test_a_run_with_a_changing_batch_goes_on_anywhere(batch: str, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    printed = train(whole, batch)
    assert "2 samples of train_samples=50, less than a step, are left over" in printed
    train(stopped, batch, "--exit-interval 3 --pipeline-model-parallel-size 2 --zero-stage 0", ranks=2)
    train(stopped, batch, "--exit-interval 5 --pipeline-model-parallel-size 2 --eval-micro-batch-size 3", ranks=2)
    train(stopped, batch, "--zero-stage 2 --eval-micro-batch-size 1", ranks=2)
    expected, found = metrics(whole), metrics(stopped)
    assert [row["global_batch_size"] for row in expected if "loss" in row] == SIZES[batch]
    last = [row for row in expected if "loss" in row][-1]
    assert last["consumed_samples"] == 48
    for key in ("learning_rate", "decoupled_learning_rate", "weight_decay", "global_batch_size", "consumed_samples"):
        assert [row[key] for row in found if key in row] == [row[key] for row in expected if key in row]
    for key in ("loss", "grad_norm", "validation_loss"):
        values = {row["step"]: row[key] for row in expected if key in row}
        assert {row["step"]: row[key] for row in found if key in row} == pytest.approx(values, rel=1e-4)
