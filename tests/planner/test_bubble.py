"""Simulated schedules against the closed formulas of their papers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.parallel.pipeline.partition import rank_of_stage
from megalm.planner.schedule import StepTimes, action_table, simulate

ALL = {
    "gpipe": 1, "1f1b": 1, "interleaved-1f1b": 2, "interleaved-zero-bubble": 2, "zbv": 2, "dualpipev": 2,
}  # fmt: skip


def simulated(name: str, ranks: int, micro_batches: int, costs: list[float] | None = None, times=StepTimes()):  # noqa: B008
    stages = ranks * ALL[name]
    places = [rank_of_stage(name, stage, ranks) for stage in range(stages)]
    table = action_table(name, ranks, ALL[name], micro_batches, places)
    return simulate(table, costs or [1.0] * stages, times, ALL[name])


@given(st.integers(1, 6), st.integers(1, 12), st.floats(0.5, 3.0))
def test_bubble_of_gpipe_and_1f1b(ranks, micro_batches, backward):
    # (p - 1) / (m + p - 1): Narayanan et al. 2021, arXiv:2104.04473, section 2.2
    for name in ("gpipe", "1f1b"):
        step = simulated(name, ranks, micro_batches, times=StepTimes(forward=1.0, backward=backward))
        assert step.bubble == pytest.approx((ranks - 1) / (micro_batches + ranks - 1), abs=1e-9)


@given(st.integers(2, 4), st.integers(1, 4))
def test_bubble_of_interleaved_1f1b_is_divided_by_the_stages_of_a_rank(ranks, rounds):
    micro_batches = ranks * rounds
    bubble = simulated("interleaved-1f1b", ranks, micro_batches).bubble
    assert bubble == pytest.approx((ranks - 1) / (2 * micro_batches + ranks - 1), abs=1e-9)


@pytest.mark.parametrize("name", ["interleaved-zero-bubble", "zbv", "dualpipev"])
def test_schedules_with_split_backward_wait_less_than_1f1b(name):
    assert simulated(name, 4, 8).bubble < simulated("interleaved-1f1b", 4, 8).bubble < simulated("1f1b", 4, 8).bubble


def test_micro_batches_in_flight():
    assert simulated("gpipe", 4, 8).in_flight == (8, 8, 8, 8)
    assert simulated("1f1b", 4, 8).in_flight == (4, 3, 2, 1)
    assert simulated("1f1b", 4, 2).in_flight == (2, 2, 2, 1)


def test_a_costly_stage_holds_up_the_others():
    # stage 1 works all the time but for the way in and out: 4 x (2 + 4) + 1 + 2 of 2 ranks
    step = simulated("1f1b", 2, 4, costs=[1.0, 2.0])
    assert step.duration == pytest.approx(27)
    assert step.bubble == pytest.approx(1 - (4 * 3 + 4 * 6) / 54)


@pytest.mark.parametrize("name", ALL)
def test_every_schedule_does_every_pass_once(name):
    times = StepTimes(forward=1.0, backward=2.0)
    step = simulated(name, 2, 4, times=times)
    assert (1 - step.bubble) * 2 * step.duration == pytest.approx(4 * 3 * 2 * ALL[name])
