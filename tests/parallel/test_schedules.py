"""Which rank holds which stage, and that torch's schedules are given exactly these."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.pipelining import PipelineStage

from megalm.config.rules.pipeline import SCHEDULES
from megalm.parallel.pipeline.partition import rank_of_stage, stages_of_rank
from megalm.parallel.pipeline.schedules import build_schedule
from megalm.planner.schedule import parts

TWO_CHUNKS = [name for name in SCHEDULES if SCHEDULES[name].chunks != (1, 1)]


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 6), st.integers(1, 4))
def test_every_stage_stands_on_one_rank_and_every_rank_has_as_many(name: str, ranks: int, chunks: int) -> None:
    held = [stages_of_rank(name, rank, ranks, ranks * chunks) for rank in range(ranks)]
    assert sorted(stage for stages in held for stage in stages) == list(range(ranks * chunks))
    assert {len(stages) for stages in held} == {chunks}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("1f1b", [0, 1, 2, 0, 1, 2]),
        ("interleaved-1f1b", [0, 1, 2, 0, 1, 2]),
        ("interleaved-zero-bubble", [0, 1, 2, 0, 1, 2]),
        ("zbv", [0, 1, 2, 2, 1, 0]),  # a V: the rank of the first stage has the last one too
        ("dualpipev", [0, 1, 2, 2, 1, 0]),
    ],
)
def test_stages_go_round_or_down_and_up_again(name: str, expected: list[int]) -> None:
    assert [rank_of_stage(name, stage, 3) for stage in range(6)] == expected


@pytest.mark.parametrize("name", TWO_CHUNKS)
@pytest.mark.parametrize("rank", [0, 1])
def test_torch_runs_on_each_rank_the_stages_that_the_rank_holds(name: str, rank: int) -> None:
    stages = [stage_of(number, rank) for number in stages_of_rank(name, rank, 2, 4)]
    schedule = build_schedule(name, stages, 4, lambda output, target: output)
    actions = [action for action in schedule.pipeline_order[rank] if action is not None]
    acted = {stage for action in actions for _, stage, _ in parts(action)}
    assert acted == {stage.stage_index for stage in stages}


@pytest.mark.parametrize("name", SCHEDULES)
def test_gradients_are_not_divided_by_the_number_of_micro_batches(name: str) -> None:
    numbers = stages_of_rank(name, 0, 2, 4 if name in TWO_CHUNKS else 2)
    schedule = build_schedule(name, [stage_of(number, 0) for number in numbers], 4, lambda output, target: output)
    assert not schedule.scale_grads


def test_1f1b_takes_fewer_micro_batches_than_stages() -> None:
    assert build_schedule("1f1b", [stage_of(0, 0)], 1, lambda output, target: output)._n_microbatches == 1


def stage_of(number: int, rank: int) -> PipelineStage:
    """A stage as a schedule's constructor looks at it; a real one needs a process group."""
    return SimpleNamespace(
        stage_index=number, num_stages=4, group_rank=rank, group_size=2, group=None, is_first=number == 0,
        is_last=number == 3, device="cpu", has_backward=True, submod=nn.Identity(),
    )  # fmt: skip
