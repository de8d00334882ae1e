"""A run that stops and goes on, on the same or on other ranks and ZeRO stages, is the run that never stopped."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from small_run import start

from megalm.checkpoint.format import find_checkpoint
from megalm.testing.spawner import run_on_ranks

BEFORE, AFTER = 2, 2
Layout = tuple[int, str]
"""Number of ranks, flags."""
Steps = list[tuple[float, float, float]]
"""Loss, gradient norm and loss scale of each."""

FP32: list[Layout] = [
    (ranks, f"--zero-stage {stage}")
    for ranks, stages in ((1, (0, 3)), (2, (0, 1, 2, 3)), (3, (1, 2, 3)))
    for stage in stages
]
BF16: list[Layout] = [(2, f"--zero-stage {stage} --bf16") for stage in (0, 1, 3)]
FP16: list[Layout] = [(2, "--zero-stage 1 --fp16 --initial-loss-scale 1024 --loss-scale-window 2")]
TENSOR_PARALLEL = "--ffn-hidden-size 20 --attention-dropout 0"
"""Sizes that two ranks divide, and nothing drawn by head."""
MUON: list[Layout] = [
    (1, f"--zero-stage 0 --optimizer muon {TENSOR_PARALLEL}"),
    (3, f"--zero-stage 1 --optimizer muon {TENSOR_PARALLEL}"),
    (2, f"--zero-stage 2 --tensor-model-parallel-size 2 --optimizer muon {TENSOR_PARALLEL}"),
]
LION: list[Layout] = [(2, "--zero-stage 1 --optimizer lion"), (3, "--zero-stage 3 --optimizer lion")]
PADDED: list[Layout] = [
    (2, f"--zero-stage {stage} --tensor-model-parallel-size 2 --make-vocab-size-divisible-by 32 {TENSOR_PARALLEL}")
    for stage in (0, 1)
]
"""The second rank's rows of the vocabulary are padding alone."""
MEMORY = "--segment-memory 12 --sampling consecutive --position-embedding-type relative"
"""More than a sample: the memory has filled up at the checkpoint, after two of them."""
SEGMENTS: list[Layout] = [
    (1, f"--zero-stage 0 {MEMORY} {TENSOR_PARALLEL}"),
    (2, f"--zero-stage 1 --tensor-model-parallel-size 2 {MEMORY} {TENSOR_PARALLEL}"),
    (3, f"--zero-stage 3 {MEMORY} {TENSOR_PARALLEL}"),
    (2, f"--zero-stage 1 --bf16 {MEMORY}"),
]
LAYOUTS = FP32 + BF16 + FP16 + MUON + LION + PADDED + SEGMENTS
TO_OTHERS: list[tuple[Layout, Layout]] = [
    ((1, "--zero-stage 0"), (2, "--zero-stage 1")),
    ((1, "--zero-stage 3"), (3, "--zero-stage 2")),
    ((2, "--zero-stage 0"), (3, "--zero-stage 3")),
    ((2, "--zero-stage 1"), (1, "--zero-stage 0")),
    ((2, "--zero-stage 2"), (3, "--zero-stage 1")),
    ((2, "--zero-stage 3"), (2, "--zero-stage 0")),
    ((3, "--zero-stage 1"), (2, "--zero-stage 3")),
    ((3, "--zero-stage 2"), (1, "--zero-stage 3")),
    ((3, "--zero-stage 3"), (2, "--zero-stage 2")),
    *((MUON[one], MUON[other]) for one, other in ((2, 0), (1, 2), (0, 1))),
    (LION[0], LION[1]),
    *((SEGMENTS[one], SEGMENTS[other]) for one, other in ((2, 0), (0, 1), (1, 2))),
]
BF16_TO_OTHERS = [(BF16[0], BF16[1]), (BF16[1], BF16[2]), (BF16[2], BF16[0])]
ALWAYS = {
    *(FP32[number] for number in (0, 3, 5)), FP16[0], MUON[2], PADDED[1],
    *(TO_OTHERS[number] for number in (0, 6, 7, 8, 9)), BF16_TO_OTHERS[1],
    SEGMENTS[2],
}  # fmt: skip
"""Layouts that go on as they are, and pairs in which every ZeRO stage gives and takes; the others are long."""


def folder_of(base: str, layout: Layout) -> str:
    return f"{base}/{layout[0]} ranks {layout[1]}"


def write_all(base: str, layouts: list[Layout]) -> list[Steps]:
    """Train, save, and go on without a stop: what the steps after the checkpoint gave."""
    went_on = []
    for layout in layouts:
        run = start(folder_of(base, layout), layout[1])
        run.step(BEFORE)
        run.save()
        run.step(AFTER)
        went_on.append(run.steps[BEFORE:])
    return went_on


def continue_all(base: str, pairs: list[tuple[Layout, Layout]]) -> list[Steps]:
    """Restore each pair's first layout into its second: what the steps after the checkpoint gave."""
    went_on = []
    for source, target in pairs:
        place = find_checkpoint(Path(folder_of(base, source)))
        assert place is not None
        run = start(f"{base}/continued", target[1], place)
        assert (run.progress.step, run.progress.consumed_samples) == (BEFORE, 6 * BEFORE)
        run.step(AFTER)
        went_on.append(run.steps)
        run.save()  # what was restored can be saved again
    return went_on


Results = dict[tuple[Layout, Layout | None], Steps]
"""By (layout, None): without a stop. By (source, target): restored."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Results:
    """What the tests that run need."""
    base, found = str(tmp_path_factory.mktemp("layouts")), Results()
    values = [item.callspec.params for item in request.session.items if item.path == request.path and "[" in item.name]
    asked = [tuple(params.values()) for params in values]
    wanted = [(of[0], of[-1]) for of in asked] + [(FP32[0], FP32[0]), (FP16[0], FP16[0])]
    for ranks in (1, 2, 3):
        layouts = [layout for layout in LAYOUTS if layout[0] == ranks and any(layout == source for source, _ in wanted)]
        by_rank = run_on_ranks(ranks, write_all, base, layouts)
        assert all(other == by_rank[0] for other in by_rank), "every rank reports the same"
        found |= {(layout, None): steps for layout, steps in zip(layouts, by_rank[0], strict=True)}
    for ranks in (1, 2, 3):
        pairs = [(source, target) for source, target in dict.fromkeys(wanted) if target[0] == ranks]
        found |= dict(zip(pairs, run_on_ranks(ranks, continue_all, base, pairs)[0], strict=True))
    return found


def often(cases: list[Any]) -> list[Any]:
    """The cases, of which those that are not in ALWAYS are long."""
    return [case if case in ALWAYS else pytest.param(*_values(case), marks=pytest.mark.long) for case in cases]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case[0], tuple) else (case,)


def name(layout: Layout) -> str:
    return f"{layout[0]} {layout[1].replace('--zero-stage ', 'zero ')}"


@pytest.mark.parametrize("layout", often(LAYOUTS), ids=name)
def test_the_same_layout_goes_on_bit_for_bit(results: Results, layout: Layout) -> None:
    assert results[(layout, layout)] == results[(layout, None)]


@pytest.mark.parametrize(("source", "target"), often(TO_OTHERS), ids=name)
def test_another_layout_goes_on_to_rounding(results: Results, source: Layout, target: Layout) -> None:
    for found, expected in zip(results[(source, target)], results[(source, None)], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("source", "target"), often(BF16_TO_OTHERS), ids=name)
def test_another_stage_goes_on_under_bf16(results: Results, source: Layout, target: Layout) -> None:
    for found, expected in zip(results[(source, target)], results[(source, None)], strict=True):
        assert found == pytest.approx(expected, rel=5e-3)


def test_the_steps_after_the_checkpoint_tell_a_wrong_state(results: Results) -> None:
    losses, norms, _ = zip(*results[(FP32[0], None)], strict=True)
    assert min(abs(one - other) for one, other in pairwise(losses)) > 1e-3
    assert max(norms) > 0.5, "gradients are clipped"
    scales = [scale for _, _, scale in results[(FP16[0], None)]]
    assert len(set(scales)) > 1, "the loss scale changes after the checkpoint"
