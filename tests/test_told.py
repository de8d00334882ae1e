"""What a run says of itself at its start, and steps in which nothing counts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalm.bad_steps import check_bad_steps
from megalm.checkpoint.fresh import command_of, note_fresh
from megalm.config.lengths import Lengths
from megalm.config.merging.load import load_config
from megalm.continuation import start_place
from megalm.errors import CheckpointError, DataError, NonFiniteError, PlatformError
from megalm.run_state import Progress
from megalm.run_summary import _batch, _schedule, _start
from megalm.training import MAX_BAD_STEPS, check_counts, note_stop

SIZES = (
    "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 8 --mock-data --lr 0.1 --micro-batch-size 2 "
)


def run_of(flags: str) -> Any:
    """What the summary needs of a run on one rank."""
    config = load_config((SIZES + "--global-batch-size 4 " + flags).split())
    lengths, sizes = Lengths.of(config, config.batch.global_size(1)), config.batch.schedule(1)
    steps, stop = lengths.end(sizes)
    return SimpleNamespace(
        config=config, lengths=lengths, batch_schedule=sizes, total_iters=steps, stop_sample=stop,
        global_batch_size=config.batch.global_size(1), data=SimpleNamespace(size=1), empty_steps=None,
        progress=Progress(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "batch", "schedule"),
    [
        ("--train-samples 30", "; 2 samples of train_samples=30, less than a step, are left over",
         "linear learning rate 0.1, down to 0 at sample 30"),
        ("--train-iters 7 --min-lr 0.01 --lr-warmup-fraction 0.1", "7 steps = 224 tokens",
         "linear learning rate 0.1, warmup over 2.8 samples, down to 0.01 at sample 28"),
        ("--train-iters 1", "1 steps", "the last step has rate 0 (--min-lr), so this run trains nothing"),
        ("--train-iters 2", "2 steps", "the last step has rate 0 (--min-lr) and changes nothing"),
        ("--train-iters 1 --lr-decay-style constant", "1 steps", "constant learning rate 0.1"),
        ("--train-samples 20 --rampup-batch-size 2 2 4", "2 growing to 4 samples",
         "the last step has rate 0 (--min-lr) and changes nothing"),
    ],
)  # fmt: skip
def test_lengths_are_told_with_what_is_left_over(flags: str, batch: str, schedule: str) -> None:
    run = run_of(flags)
    assert batch in _batch(run)
    assert _schedule(run).endswith(schedule)


def test_random_weights_are_told() -> None:
    assert _start(Progress(), None, skip_train=True).startswith("RANDOM WEIGHTS are evaluated")
    assert _start(Progress(), None, skip_train=False).startswith("from scratch")
    assert _start(Progress(), Path("x"), skip_train=True).startswith("from x")


def test_a_run_without_tokens_that_count_ends() -> None:
    def step(run: Any, count: float) -> None:
        check_counts(run, SimpleNamespace(counts={"lm": count, "other": 0.0}))  # type: ignore[arg-type]

    with pytest.raises(DataError, match="all are masked"):
        step(run_of("--train-iters 3"), 0.0)
    run = run_of("--train-iters 3")
    for count in [5.0, *[0.0] * (MAX_BAD_STEPS - 1), 1.0, *[0.0] * (MAX_BAD_STEPS - 1)]:
        step(run, count)
    with pytest.raises(DataError, match="all are masked"):
        step(run, 0.0)


def test_samples_of_skipped_steps_are_counted_by_their_own_batch() -> None:
    run = run_of("--train-iters 30")
    run.saved_step, run.context = 1, SimpleNamespace(device=None)
    run.progress.count(1.0, False, 4)
    for samples in [4] * (MAX_BAD_STEPS - 1) + [8]:  # the batch has grown meanwhile
        run.progress.count(1.0, True, samples)
    with pytest.raises(NonFiniteError, match="the data of samples 4 and on"):
        check_bad_steps(run)


def test_a_full_disk_at_the_note_that_a_run_has_stopped_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise PlatformError("no space left on device")

    run = run_of(f"--train-iters 3 --save {tmp_path} --fresh")
    run.context = SimpleNamespace(rank=0)
    note_fresh(tmp_path, command_of(run.config))
    monkeypatch.setattr("megalm.checkpoint.fresh.replace_text", full)
    note_stop(run, True)
    assert "no space left on device" in caplog.text


def test_one_folder_for_save_and_load_is_gone_on_from_once_it_holds_a_checkpoint(tmp_path: Path) -> None:
    flags = f"{SIZES} --train-iters 3 --save {tmp_path}/run --load {tmp_path}/"
    assert start_place(load_config(f"{flags}run/../run".split())) == (None, False)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        start_place(load_config(f"{flags}other".split()))
