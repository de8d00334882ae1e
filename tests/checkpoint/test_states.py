"""What has state besides tensors is saved and continued with the run, without the checkpoint knowing of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from small_run import CPU, IDENTITY, start

from megalm.checkpoint.format import Manifest
from megalm.continuation import ResumePoint, save
from megalm.run_state import Progress, SampleOrder
from megalm.testing.spawner import run_on_ranks


@dataclass
class Anomalies:
    """State that somebody adds one day."""

    name = "anomalies"
    seen: int = 0

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


PROGRESS = Progress(step=4, consumed_samples=24, nan_iterations=1)


def save_and_load(folder: str) -> tuple[Anomalies, Progress]:
    run, found, progress = start(folder), Anomalies(), Progress()
    save(run.engine, run.config, IDENTITY, 4, [PROGRESS, Anomalies(3)], "one", CPU)
    ResumePoint.of(run.config, IDENTITY).load(found, progress)
    return found, progress


def test_a_new_kind_of_state_is_saved_and_loaded_by_its_name(tmp_path: Path) -> None:
    assert run_on_ranks(1, save_and_load, str(tmp_path)) == [(Anomalies(3), PROGRESS)]
    states = Manifest.read(tmp_path / "step_4").states
    assert states == {"progress": PROGRESS.state(), "anomalies": {"seen": 3}}


def test_what_the_checkpoint_does_not_know_stays_as_it_is() -> None:
    found = Anomalies(2)
    ResumePoint(states={"progress": {}}).load(found)
    assert found.seen == 2


def test_an_order_goes_through_the_manifest() -> None:
    order = SampleOrder(Progress())
    assert order.state() == {}, "the number of a generated sample says all"
    order.load({})
    assert order.record is None
    record = {"weights": None, "start": 0, "consumed": 8, "datasets": []}
    order.load(record)
    assert order.record is not None
    assert (order.record.consumed, order.record.datasets) == (8, [])
