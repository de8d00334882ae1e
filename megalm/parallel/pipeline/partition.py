"""Which layers stand in which pipeline stage, and which stages on which rank. Pure arithmetic on integers.

A stage is a run of consecutive layers; the first also holds the embedding, the last the output head. A rank holds one
stage, or several of them as its chunks.
"""

from collections.abc import Sequence
from itertools import accumulate

from megalm.config.parallel import PipelineSchedule
from megalm.config.rules.pipeline import SCHEDULES
from megalm.models.contract import PartCosts


def balanced_layers(num_layers: int, num_stages: int, costs: PartCosts) -> list[range]:
    """The layers of each stage, at least one each, so that the costliest stage costs as little as can be.

    Exact where all layers cost the same: each layer goes to the stage that is cheapest so far, the earlier one of
    equals. That minimizes the sum of squared stage costs as well, so the other stages are even too.
    """
    assert 1 <= num_stages <= num_layers, f"{num_stages} stages need a layer each, {num_layers} layers are there"
    if costs.layers:
        return _balanced_runs(num_stages, costs)
    counts = [1] * num_stages
    loads = costs.of_stages(layer_ranges(counts))
    for _ in range(num_layers - num_stages):
        stage = loads.index(min(loads))
        loads[stage] += costs.layer
        counts[stage] += 1
    return layer_ranges(counts)


def _balanced_runs(num_stages: int, costs: PartCosts) -> list[range]:
    """The same for layers of different costs: the costliest stage is as cheap as can be, then the squares are few.

    `best[stop]` is what so many stages make of the layers up to `stop`: (costliest, sum of squares, stages' stops).
    """
    sums = [0, *accumulate(costs.layers)]
    layers = len(costs.layers)
    first = [sums[stop] + costs.embedding for stop in range(layers + 1)]
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {
        stop: (first[stop], first[stop] ** 2, (stop,)) for stop in range(1, layers + 1)
    }
    for stage in range(1, num_stages):
        end = costs.head if stage == num_stages - 1 else 0
        best = {
            stop: min(
                (max(costliest, cost), squares + cost**2, (*stops, stop))
                for start, (costliest, squares, stops) in best.items()
                if start < stop
                for cost in [sums[stop] - sums[start] + end]
            )
            for stop in range(stage + 1, layers + 1)
        }
    stops = best[layers][2]
    return [range(start, stop) for start, stop in zip((0, *stops), stops, strict=False)]


def layer_ranges(counts: Sequence[int]) -> list[range]:
    """Numbers of layers, stage by stage, as the layers themselves."""
    stops = [sum(counts[: stage + 1]) for stage in range(len(counts))]
    return [range(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]


def stages_of_rank(name: PipelineSchedule, rank: int, num_ranks: int, num_stages: int) -> list[int]:
    """The stages that pipeline rank `rank` holds, in the order of the model."""
    return [stage for stage in range(num_stages) if rank_of_stage(name, stage, num_ranks) == rank]


def rank_of_stage(name: PipelineSchedule, stage: int, num_ranks: int) -> int:
    """The pipeline rank that holds `stage`."""
    turn, position = divmod(stage, num_ranks)
    return num_ranks - 1 - position if SCHEDULES[name].v_shaped and turn % 2 else position
