"""What has state besides tensors is saved and continued with the run, without the checkpoint knowing of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from small_run import CPU, IDENTITY, start

from megalm.checkpoint.format import Manifest
from megalm.continuation import Progress, ResumePoint, SampleOrder, save


@dataclass
class Anomalies:
    """State that somebody adds one day."""

    name = "anomalies"
    seen: int = 0

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


@pytest.mark.usefixtures("_alone")
def test_a_new_kind_of_state_is_saved_and_loaded_by_its_name(tmp_path: Path) -> None:
    run, progress = start(str(tmp_path)), Progress(step=4, consumed_samples=24, nan_iterations=1)
    place = save(run.engine, run.config, IDENTITY, 4, [progress, Anomalies(3)], "one", CPU)
    assert Manifest.read(place).states == {"progress": progress.state(), "anomalies": {"seen": 3}}
    found, later = Anomalies(), Progress()
    ResumePoint.of(run.config, IDENTITY).load(found, later)
    assert (found.seen, later) == (3, progress)


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
