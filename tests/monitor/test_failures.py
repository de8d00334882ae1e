"""Metrics, curves and logs that cannot be written are one warning each, and nothing else happens."""

import errno
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megalm.config.output import LoggingConfig
from megalm.monitor.log import start_logging
from megalm.monitor.logger import MetricLogger
from megalm.monitor.sinks import RunFacts, build_sinks
from megalm.monitor.sinks.base import EVERY_STEP
from megalm.monitor.sinks.jsonl import JsonlSink, read_metrics
from megalm.monitor.sinks.tensorboard import TensorBoardSink

FACTS = RunFacts(folder=None, resume_step=0, resume_samples=0, total_iters=9)
ROW = {"step": 1, "consumed_samples": 4, "loss": 2.0}


def report(sinks: Any, steps: int) -> None:
    """What a run of `steps` steps tells."""
    logger = MetricLogger(sinks, FACTS, flops_per_token=1.0, ranks=1)
    logger.text("config", "x")
    for step in range(1, steps + 1):
        logger.step(ROW | {"step": step}, tokens=1, data_wait_s=0.0)
    logger.close()


class Broken:
    """A sink that never works."""

    cadence = EVERY_STEP

    def __init__(self, error: Exception) -> None:
        self.error = error

    def row(self, step: int, values: Mapping[str, Any]) -> None:
        raise self.error

    def text(self, name: str, text: str, step: int) -> None:
        raise self.error

    def close(self) -> None:
        raise self.error


class Kept(Broken):
    """A sink that works."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def row(self, step: int, values: Mapping[str, Any]) -> None:
        self.steps.append(step)

    def text(self, name: str, text: str, step: int) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("error", "said"),
    [(OSError(errno.ENOSPC, "x", "/tmp/f"), "Broken cannot write /tmp/f: No space left"), (KeyError("a"), "KeyError")],
)
def test_a_sink_that_fails_is_said_once_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture, error: Exception, said: str
) -> None:
    kept = Kept()
    with caplog.at_level(logging.WARNING, "megalm"):
        report([Broken(error), kept], 5)
    assert [said in record.getMessage() for record in caplog.records] == [True]
    assert kept.steps == [1, 2, 3, 4, 5]


def test_a_file_in_place_of_tensorboards_folder(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING, "megalm"):
        report([TensorBoardSink(tmp_path / "file", resume_step=0, resume_samples=0, queue_size=10)], 3)
    assert [f"cannot write {tmp_path}/file" in record.getMessage() for record in caplog.records] == [True]


def test_metrics_go_on_when_there_is_room_again(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", resume_step=0)
    stream = sink._stream

    class Full:
        """A disk with room for half a row, once, and then for none; after that for all."""

        def __init__(self) -> None:
            self.left = [7, -1]

        def write(self, content: bytes) -> int:
            room = self.left.pop(0) if self.left else len(content)
            if room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return stream.write(content[:room])

        def __getattr__(self, name: str) -> Any:
            return getattr(stream, name)

    with caplog.at_level(logging.WARNING, "megalm"):
        monkeypatch.setattr(sink, "_stream", Full())
        report([sink], 3)
    assert ["No space left" in record.getMessage() for record in caplog.records] == [True]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2, 3]


def test_a_sink_whose_files_cannot_be_had_is_left_out(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    endless = tmp_path / "endless.jsonl"
    endless.symlink_to("/dev/zero")
    JsonlSink(endless, resume_step=0).close()
    facts = RunFacts(folder=tmp_path, resume_step=0, resume_samples=0, total_iters=9)
    with caplog.at_level(logging.WARNING, "megalm"):
        sinks = build_sinks(LoggingConfig(sinks=("terminal", "jsonl")), facts)
    assert len(sinks) == 1
    assert ["Is a directory" in record.getMessage() for record in caplog.records] == [True]


def test_logs_that_cannot_be_written_are_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").touch()
    start_logging(0, tmp_path / "logs").info("goes on")
    out = capsys.readouterr().out
    assert "logs/rank_00000.log cannot be written, the run goes on without it: File exists" in out
    assert "goes on\n" in out


def test_a_log_on_a_full_disk_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = start_logging(0, tmp_path / "logs")
    logger.handlers[0].stream = open("/dev/full", "w")  # type: ignore[attr-defined]  # noqa: SIM115
    for _ in range(3):
        logger.info("goes on")
    told = capsys.readouterr()
    assert told.out.count("goes on") == 3
    assert told.err.count("No space left on device") == 1
    assert "Traceback" not in told.err


def test_a_terminal_that_is_gone_is_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115
    start_logging(0, None).info("nobody reads this")
    assert capsys.readouterr().err == ""
