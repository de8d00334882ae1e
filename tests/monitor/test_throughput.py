"""Speed counts training time only: what is paused does not slow it down."""

from typing import Any

import pytest

from megalm.monitor import throughput
from megalm.monitor.logger import MetricLogger
from megalm.monitor.sinks import Cadence, RunFacts
from megalm.monitor.throughput import Throughput


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(throughput.time, "monotonic", found.monotonic)
    return found


def test_time_tokens_and_flops_are_per_step_and_per_second(clock: Clock) -> None:
    meter = Throughput(flops_per_token=3e9, ranks=2)
    for _ in range(4):
        clock.now += 0.5
        meter.add(tokens=1000, data_wait_s=0.1)
    assert meter.read() == pytest.approx(
        {"iteration_time_s": 0.5, "tokens_per_s": 2000, "tflops_per_rank": 2000 * 3e9 / 2 / 1e12, "data_wait_s": 0.1}
    )


def test_paused_time_is_not_counted(clock: Clock) -> None:
    meter = Throughput(flops_per_token=1.0, ranks=1)
    clock.now += 1
    meter.add(100, 0.0)
    for _ in range(2):  # an evaluation, then a save
        meter.pause()
        clock.now += 50
        meter.resume()
    clock.now += 1
    meter.add(100, 0.0)
    assert meter.read()["iteration_time_s"] == pytest.approx(1.0)
    assert meter.read()["tokens_per_s"] == pytest.approx(100)


def test_a_new_interval_forgets_the_old_one_and_its_pauses(clock: Clock) -> None:
    meter = Throughput(flops_per_token=1.0, ranks=1)
    meter.pause()
    clock.now += 50
    meter.resume()
    meter.add(1, 5.0)
    meter.restart()
    clock.now += 2
    meter.add(10, 0.5)
    assert meter.read() == pytest.approx(
        {"iteration_time_s": 2, "tokens_per_s": 5, "tflops_per_rank": 5e-12, "data_wait_s": 0.5}
    )


class Kept:
    """A sink that keeps what it gets."""

    def __init__(self, cadence: Cadence) -> None:
        self.cadence = cadence
        self.rows: list[dict[str, Any]] = []

    def row(self, step: int, values: dict[str, Any]) -> None:
        self.rows.append(values)

    def text(self, name: str, text: str, step: int) -> None: ...

    def close(self) -> None: ...


def test_each_sink_has_the_speed_of_its_own_interval_and_every_meter_is_paused(clock: Clock) -> None:
    points, lines = Kept(Cadence(1)), Kept(Cadence(2, at_ends=True))
    facts = RunFacts(folder=None, resume_step=0, resume_samples=0, total_iters=4)
    metric_logger = MetricLogger([points, lines], facts, flops_per_token=1.0, ranks=1)
    for step in range(1, 5):
        clock.now += 1
        metric_logger.step({"step": step}, tokens=7, data_wait_s=0.0)
        metric_logger.pause()
        clock.now += 30
        metric_logger.resume()
    assert [row["iteration_time_s"] for row in points.rows] == pytest.approx([1, 1, 1, 1])
    assert [row["step"] for row in lines.rows] == [1, 2, 4]
    assert [row["iteration_time_s"] for row in lines.rows] == pytest.approx([1, 1, 1])
