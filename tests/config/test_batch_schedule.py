"""Batch sizes that change over a run: as Megatron's formulas, and the number of steps as counting them one by one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.config.batch_schedule import BatchSchedule, read_step_schedule


def megatrons_ramp(consumed: int, start: int, increment: int, samples: int, end: int) -> int:
    """Megatron-LM's RampupBatchsizeNumMicroBatchesCalculator, written out from its description."""
    if consumed > samples:
        return end
    per_increment = samples / ((end - start) // increment)
    return start + int(consumed / per_increment) * increment


@pytest.mark.parametrize(
    "ramp", [(16, 8, 3000, 1024), (32, 32, 1953, 512), (4, 4, 100, 16), (1, 1, 7, 3), (2, 6, 10, 8)]
)
def test_the_ramp_is_megatrons(ramp: tuple[int, int, int, int]) -> None:
    schedule = BatchSchedule.ramp(*ramp)
    for consumed in range(ramp[2] + 50):
        assert schedule.size(consumed) == megatrons_ramp(consumed, *ramp), consumed


def test_step_schedules_are_read_as_megatron_does() -> None:
    schedule = read_step_schedule("0:768 250B:1536 500B:3072 750B:6144", 4096)
    assert schedule.stages == ((0, 768), (61035156, 1536), (122070312, 3072), (183105468, 6144))
    assert read_step_schedule("1.5k:8,0:4", 100).stages == ((0, 4), (15, 8))


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    gaps=st.lists(st.integers(1, 40), min_size=4, max_size=4),
    start=st.integers(0, 60),
    stop=st.integers(0, 200),
)
def test_steps_are_counted_as_one_by_one(sizes: list[int], gaps: list[int], start: int, stop: int) -> None:
    firsts = [0, *(sum(gaps[:number]) for number in range(1, len(sizes)))]
    schedule = BatchSchedule(tuple(zip(firsts, sizes, strict=True)))
    steps, sample = 0, start
    while sample + schedule.size(sample) <= stop:
        sample += schedule.size(sample)
        steps += 1
    assert schedule.steps(start, stop) == (steps, sample)


def test_the_end_of_a_long_run_is_found_at_once() -> None:
    assert BatchSchedule.ramp(16, 16, 10**9, 4096).steps(0, 10**15)[0] > 2 * 10**11
