"""Event files as TensorBoard's own reader sees them: tags, steps, no zig-zag and no loss after a resume."""

import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalm.config.output import LoggingConfig
from megalm.monitor.logger import MetricLogger
from megalm.monitor.sinks import RunFacts, build_sinks
from megalm.monitor.sinks.tensorboard import TensorBoardSink

BATCH = 8
MEGATRON_TAGS = {"lm loss", "learning-rate", "grad-norm", "batch-size", "loss-scale", "params-norm", "iteration-time"}
WITH_TWIN = {"lm loss", "learning-rate", "grad-norm", "batch-size", "loss-scale"}
VALIDATION_TAGS = {"lm loss validation", "lm loss validation ppl"}


def row(step: int, loss: float = 1.0) -> dict[str, Any]:
    return {
        "step": step,
        "consumed_samples": BATCH * step,
        "loss": loss,
        "learning_rate": 0.1,
        "grad_norm": 2.0,
        "global_batch_size": BATCH,
        "loss_scale": 1.0,
        "params_norm": 3.0,
        "skipped_iterations": 0,
        "nan_iterations": 0,
        "memory_bytes": 1000,
    }


def write(folder: Path, steps: range, resume_step: int, loss: float) -> None:
    writer = TensorBoardSink(folder, resume_step=resume_step, resume_samples=BATCH * resume_step, queue_size=10)
    for step in steps:
        writer.row(step, row(step, loss) | {"iteration_time_s": 0.5, "tokens_per_s": 9.0})
    writer.close()


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every scalar, as a reader of the whole folder tree sees them."""
    scalars: dict[str, list[tuple[int, float]]] = {}
    for place in (folder, folder / "vs_samples"):
        events = EventAccumulator(str(place), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            assert tag not in scalars
            scalars[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return scalars


def test_points_have_megatrons_tags_over_steps_and_over_samples(tmp_path: Path) -> None:
    writer = TensorBoardSink(tmp_path, resume_step=0, resume_samples=0, queue_size=10)
    writer.row(1, row(1, 5.0) | {"iteration_time_s": 0.5, "tokens_per_s": 9.0})
    writer.row(2, row(2, 4.0))
    writer.row(2, {"step": 2, "consumed_samples": 16, "validation_loss": 4.5, "validation_ppl": 90.0})
    writer.close()
    scalars = read(tmp_path)
    twins = {f"{tag} vs samples" for tag in WITH_TWIN | VALIDATION_TAGS}
    own = {"throughput/tokens-per-s", "mem-max-allocated-bytes"}
    assert set(scalars) == MEGATRON_TAGS | VALIDATION_TAGS | twins | own
    assert scalars["lm loss"] == [(1, 5.0), (2, 4.0)]
    assert scalars["lm loss vs samples"] == [(8, 5.0), (16, 4.0)]
    assert scalars["lm loss validation"] == [(2, 4.5)]
    assert scalars["lm loss validation ppl vs samples"] == [(16, 90.0)]
    assert scalars["iteration-time"] == [(1, 0.5)]


@pytest.mark.parametrize("resume_step", [4, 0], ids=["from a checkpoint", "before the first checkpoint"])
def test_after_a_resume_there_is_one_point_a_step_and_the_past_is_kept(tmp_path: Path, resume_step: int) -> None:
    write(tmp_path, range(1, 8), 0, loss=1.0)
    time.sleep(1.1)  # event files are ordered by the second in their names
    write(tmp_path, range(resume_step + 1, 10), resume_step, loss=2.0)
    for tag, points in read(tmp_path).items():
        if tag.removesuffix(" vs samples") == "lm loss":
            unit = BATCH if "samples" in tag else 1
            assert points == [(unit * step, 1.0 if step <= resume_step else 2.0) for step in range(1, 10)], tag


def metric_logger(folder: Path | None, *, is_main: bool = True, resume_step: int = 0, **logging: Any) -> MetricLogger:
    facts = RunFacts(folder=folder, resume_step=resume_step, resume_samples=BATCH * resume_step, total_iters=9)
    sinks = build_sinks(LoggingConfig(**logging), facts) if is_main else []
    return MetricLogger(sinks, facts, flops_per_token=6.0, ranks=1)


def test_it_writes_every_step_and_the_configuration(tmp_path: Path) -> None:
    shown = metric_logger(tmp_path, log_interval=100)
    shown.text("config", "lr: 0.1")
    for step in range(1, 4):
        shown.step(row(step), tokens=64, data_wait_s=0.01)
    shown.evaluation({"step": 3, "consumed_samples": 24, "validation_loss": 4.0, "validation_ppl": 50.0})
    shown.close()
    scalars = read(tmp_path / "tensorboard")
    assert [step for step, _ in scalars["lm loss"]] == [1, 2, 3]
    assert [step for step, _ in scalars["throughput/model-tflops-per-rank"]] == [1, 2, 3]
    assert [step for step, _ in scalars["lm loss validation vs samples"]] == [24]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert "config/text_summary" in events.Tags()["tensors"]


def test_the_interval_of_points_and_another_folder_are_respected(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shown = metric_logger(
        tmp_path / "run", tensorboard_log_interval=3, tensorboard_dir=str(tmp_path / "events"), log_interval=100
    )
    for step in range(1, 8):
        shown.step(row(step), tokens=64, data_wait_s=0.0)
    shown.close()
    assert [step for step, _ in read(tmp_path / "events")["lm loss"]] == [3, 6]
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_only_one_rank_writes(tmp_path: Path) -> None:
    silent = metric_logger(tmp_path, is_main=False)
    silent.step(row(1), tokens=64, data_wait_s=0.0)
    silent.evaluation({"step": 1, "consumed_samples": 8, "validation_loss": 4.0, "validation_ppl": 50.0})
    silent.close()
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = metric_logger(None)
    shown.step(row(1), tokens=64, data_wait_s=0.0)
    shown.close()
    assert list(tmp_path.iterdir()) == []
