"""metrics.jsonl holds each logged step once, whatever happened to earlier starts of the run."""

import math
from pathlib import Path

from megalm.config.output import LoggingConfig
from megalm.monitor.logger import MetricLogger
from megalm.monitor.sinks import RunFacts, build_sinks
from megalm.monitor.sinks.jsonl import JsonlSink, read_metrics


def write(path: Path, steps: range, resume_step: int = 0, start: int = 1) -> None:
    metrics = JsonlSink(path, resume_step=resume_step)
    for step in steps:
        metrics.row(step, {"step": step, "start": start})
    metrics.close()


def test_rows_come_back_and_are_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = JsonlSink(path, resume_step=0)
    metrics.row(1, {"step": 1, "loss": 2.5, "note": "ß"})
    metrics.row(2, {"step": 2, "loss": math.nan})
    first, second = read_metrics(path)
    assert first == {"step": 1, "loss": 2.5, "note": "ß"}
    assert second["loss"] is None, "strict JSON has no NaN"
    metrics.close()


def test_a_resume_drops_the_rows_after_its_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    write(path, range(5, 7), resume_step=4, start=2)
    assert [(row["step"], row["start"]) for row in read_metrics(path)] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 1),
        (5, 2),
        (6, 2),
    ]


def test_a_start_from_scratch_drops_all_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    write(path, range(1, 2), start=2)
    assert read_metrics(path) == [{"step": 1, "start": 2}]


def test_a_last_line_cut_by_a_kill_is_left_out_and_does_not_spoil_the_next_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 5))
    whole = path.read_bytes()
    for cut in range(1, len('{"step": 4, "start": 1}\n') + 1):
        path.write_bytes(whole[:-cut])
        kept = 4 if cut == 1 else 3
        assert [row["step"] for row in read_metrics(path)] == list(range(1, kept + 1))
        write(path, range(5, 6), resume_step=4, start=2)
        assert [row["step"] for row in read_metrics(path)] == [*range(1, kept + 1), 5], f"{cut} bytes cut"


def test_it_logs_at_its_interval_and_at_both_ends(tmp_path: Path) -> None:
    facts = RunFacts(folder=tmp_path, resume_step=4, resume_samples=32, total_iters=10)
    sinks = build_sinks(LoggingConfig(log_interval=3), facts)
    metric_logger = MetricLogger(sinks, facts, flops_per_token=1.0, ranks=1)
    for step in range(5, 11):
        row = {"step": step, "consumed_samples": 8 * step, "loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1}
        counts = {"global_batch_size": 8, "loss_scale": 1.0, "skipped_iterations": 0, "nan_iterations": 0}
        metric_logger.step(row | counts, tokens=64, data_wait_s=0.0)
    metric_logger.close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [5, 6, 9, 10]
