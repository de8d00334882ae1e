"""Steps whose loss or gradients are not finite: nothing bad is published, nothing good is lost, the run goes on."""

from pathlib import Path

import pytest

from megalm.checkpoint.format import find_checkpoint, steps_of
from megalm.checkpoint.reader import CheckpointReader
from megalm.testing import warm
from megalm.testing.processes import Finished
from megalm.testing.small_runs import SCRIPT

RUN = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --micro-batch-size 4 --vocab-size 33 "
    "--mock-data --eval-iters 0 --lr-decay-style constant --train-iters 20 --log-interval 1 --kernels-backend reference"
)


def train(folder: Path, flags: str) -> Finished:
    return warm.run(SCRIPT, *RUN.split(), "--save", folder, *flags.split())


@pytest.mark.parametrize("interval", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_run_that_diverged_goes_on_from_its_last_good_checkpoint(tmp_path: Path, interval: int) -> None:
    keep = f"--save-interval {interval} --keep-checkpoints {interval}"
    assert train(tmp_path, f"{keep} --lr 1e-2 --exit-interval 6").code == 0
    diverged = train(tmp_path, f"{keep} --lr 1e12")
    assert diverged.code == 5, diverged.output
    assert "the gradients of the last 10 steps were not finite" in diverged.output
    place = find_checkpoint(tmp_path)
    assert place == tmp_path / "step_6", diverged.output
    assert "step_6" in diverged.output.splitlines()[-1]
    CheckpointReader(place)
    assert all(step <= 7 for step in steps_of(tmp_path)), "no bad step is saved"
    mended = train(tmp_path, f"{keep} --lr 1e-2")
    assert mended.code == 0, mended.output
    assert steps_of(tmp_path)[-1] == 20


ENDS = [
    ("--fp16 --loss-scale 1e9", 5, "give a smaller --loss-scale"),
    ("--fp16 --initial-loss-scale 4294967296", 0, "saved"),
    ("--lr 1e30 --train-iters 4", 5, "not"),
]


@pytest.mark.parametrize(("flags", "code", "text"), ENDS)
def test_only_a_loss_scale_that_adapts_may_skip_steps(tmp_path: Path, flags: str, code: int, text: str) -> None:
    done = train(tmp_path, f"--lr 1e-2 {flags}")
    assert done.code == code, done.output
    assert text in done.output
    assert (find_checkpoint(tmp_path) is None) == (code == 5)


def test_a_changed_loss_scale_wins_over_the_saved_one(tmp_path: Path) -> None:
    assert train(tmp_path, "--lr 1e-2 --fp16 --loss-scale 512 --exit-interval 3").code == 0
    done = train(tmp_path, "--lr 1e-2 --fp16 --loss-scale 128 --train-iters 4")
    assert done.code == 0, done.output
    assert "precision.loss_scale was 512.0, is 128.0" in done.output
    metrics = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert '"loss_scale": 128.0' in next(line for line in metrics if '"step": 4' in line)
