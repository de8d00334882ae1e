"""A pipeline schedule's action table, and how long a step takes by it: the bubble before anything runs.

The tables are those that `torch.distributed.pipelining` executes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.distributed.pipelining import schedules

_CLASSES: dict[str, Any] = {
    "gpipe": schedules.ScheduleGPipe,
    "interleaved-1f1b": schedules.ScheduleInterleaved1F1B,
    "interleaved-zero-bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}
Table = list[list[Any]]
"""The actions of each rank, in order; a `schedules._Action` names stage, kind and micro-batch."""


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds (or any unit) that one stage of average cost takes for one micro-batch."""

    forward: float = 1.0
    backward: float = 2.0
    """Input and weight gradients together; each is half of it where a schedule computes them apart."""


@dataclass(frozen=True, kw_only=True)
class SimulatedStep:
    """What a schedule does to one step."""

    duration: float
    """From the first forward pass to the last backward pass, in the unit of the times."""
    bubble: float
    """Share of all ranks' time in which they wait for others: 1 - work / (ranks x duration)."""
    in_flight: tuple[float, ...]
    """By rank: most micro-batches whose activations are held at one time; of several stages each counts its share."""


def action_table(schedule: str, num_ranks: int, chunks: int, micro_batches: int, stage_ranks: Sequence[int]) -> Table:
    """What each rank does in a step: stage s stands on rank `stage_ranks[s]`, `chunks` stages a rank."""
    if schedule == "1f1b":
        return [_one_forward_one_backward(rank, num_ranks, micro_batches) for rank in range(num_ranks)]
    stages = [
        SimpleNamespace(
            stage_index=stage, num_stages=len(stage_ranks), group_rank=0, group_size=num_ranks, group=None,
            is_first=stage == 0, is_last=stage == len(stage_ranks) - 1, device="cpu", has_backward=True,
            submod=nn.Identity(),
        )
        for stage, rank in enumerate(stage_ranks) if rank == 0
    ]  # fmt: skip
    only = stages[0] if schedule == "gpipe" else stages
    built = _CLASSES[schedule](only, micro_batches, loss_fn=lambda output, target: output)
    return [[action for action in built.pipeline_order[rank] if action is not None] for rank in range(num_ranks)]


def _one_forward_one_backward(rank: int, num_ranks: int, micro_batches: int) -> list[Any]:
    """1F1B, which torch runs from its counters: forward passes until the last rank has one, then a backward for each.

    torch's own table of it leaves out forward passes of the last rank.
    """
    ahead = min(micro_batches, num_ranks - rank)
    words = [f"{rank}F{number}" for number in range(ahead)]
    for number in range(micro_batches):
        words.append(f"{rank}B{number}")
        words += [f"{rank}F{number + ahead}"] if number + ahead < micro_batches else []
    return [schedules._Action.from_str(word) for word in words]


def simulate(table: Table, costs: Sequence[float], times: StepTimes, chunks: int = 1) -> SimulatedStep:
    """Run the table: every rank takes its actions in order, each as soon as what it needs is there.

    `costs` holds the cost of each stage relative to the average. Communication takes no time.
    """
    done: dict[tuple[str, int, int], float] = {}
    clocks, finished, work = [0.0] * len(table), [0] * len(table), 0.0
    last = len(costs) - 1
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(table):
            while finished[rank] < len(actions):
                work_parts = parts(actions[finished[rank]])
                needs = [need for part in work_parts for need in _needs(*part, last) if need not in work_parts]
                ready = [done.get(need) for need in needs]
                if any(moment is None for moment in ready):
                    break
                start = max([clocks[rank], *(moment for moment in ready if moment is not None)])
                cost = sum(_time(kind, times) * costs[stage] for kind, stage, _ in work_parts)
                clocks[rank], work = start + cost, work + cost
                done |= dict.fromkeys(work_parts, clocks[rank])
                done |= {("gradient", stage, n): clocks[rank] for kind, stage, n in work_parts if kind in ("B", "I")}
                finished[rank] += 1
                moved = True
    assert all(count == len(actions) for count, actions in zip(finished, table, strict=True)), (
        "the table has no deadlock"
    )
    duration = max(clocks)
    held = tuple(_most_in_flight(actions) / chunks for actions in table)
    return SimulatedStep(duration=duration, bubble=1 - work / (len(table) * duration), in_flight=held)


Part = tuple[str, int, int]
"""Kind (F forward, I input gradient, W weight gradient, B both), stage, micro-batch."""


def parts(action: Any) -> list[Part]:
    """The work of an action: one part, two where forward and backward overlap, none of the reduction at the end."""
    if action.sub_actions is not None:
        return [part for sub in action.sub_actions for part in parts(sub)]
    kind = action.computation_type.value
    return [(kind, action.stage_index, action.microbatch_index)] if kind in ("F", "I", "W", "B") else []


def _needs(kind: str, stage: int, number: int, last: int) -> list[Part]:
    if kind == "F":
        return [("F", stage - 1, number)] if stage else []
    if kind == "W":
        return [("I", stage, number)]
    return [("F", stage, number)] if stage == last else [("gradient", stage + 1, number)]


def _time(kind: str, times: StepTimes) -> float:
    return {"F": times.forward, "B": times.backward}.get(kind, times.backward / 2)


def _most_in_flight(actions: Sequence[Any]) -> int:
    held = most = 0
    for action in actions:
        kinds = [kind for kind, _, _ in parts(action)]
        held += kinds.count("F")
        most = max(most, held)
        held -= kinds.count("B") + kinds.count("W")
    return most
