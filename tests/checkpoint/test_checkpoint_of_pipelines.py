"""A checkpoint of pipeline stages is that of the whole model: all layouts go on from it, tied weights once."""

import json
from pathlib import Path

import pytest
from small_run import start

from megalm.checkpoint.format import MANIFEST
from megalm.testing.spawner import run_on_ranks

DEEP = "--num-layers 4 --attention-dropout 0 --ffn-hidden-size 20"
PP2 = f"{DEEP} --pipeline-model-parallel-size 2 --zero-stage 1 --pipeline-schedule"
OFTEN = [(1, f"{DEEP} --zero-stage 0"), (4, f"{PP2} interleaved-1f1b --tensor-model-parallel-size 2")]
TARGETS = [
    *OFTEN,
    (2, f"{PP2} 1f1b"),
    (2, f"{PP2} zbv"),
    (4, f"{DEEP} --pipeline-model-parallel-size 4 --zero-stage 2"),
]


def write(folder: str, flags: str) -> list[tuple[float, float, float]]:
    run = start(folder, flags)
    run.step(2)
    run.save()
    run.step(2)
    return run.steps[2:]


def go_on(folder: str, flags: str, place: str) -> list[tuple[float, float, float]]:
    run = start(folder, flags, Path(place))
    run.step(2)
    return run.steps


@pytest.mark.parametrize(
    ("schedule", "targets"),
    [
        pytest.param("zbv", OFTEN, id="zbv"),
        *(pytest.param(name, TARGETS, id=f"{name} to all", marks=pytest.mark.long) for name in ("zbv", "1f1b")),
    ],
)
def test_every_layout_goes_on_from_a_pipeline(tmp_path: Path, schedule: str, targets: list[tuple[int, str]]) -> None:
    written = run_on_ranks(2, write, str(tmp_path / "run"), f"{PP2} {schedule}")[0]
    place = tmp_path / "run" / "step_2"
    tensors = json.loads((place / MANIFEST).read_text())["tensors"]
    assert len(tensors["embedding.tokens.weight"]["slices"]) == 1, "one stage writes the tied weight"
    assert {name.split(".")[1] for name in tensors if name.startswith("layers.")} == {"0", "1", "2", "3"}
    for ranks, flags in targets:
        for found in run_on_ranks(ranks, go_on, str(tmp_path / "other"), flags, str(place)):
            for one, other in zip(found, written, strict=True):
                assert one == pytest.approx(other, rel=1e-5)
