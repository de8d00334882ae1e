"""Layers that are alike, of which three tell what a pass takes through any number of them.

What a stage holds changes by the same amount in each of a run of equal layers but for the first and the last of it,
and each has its most at the same place.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from torch import nn

from megalm.config.recompute import RecomputeConfig
from megalm.models.contract import LayerRunner, LayerStep, Stream
from megalm.parallel.recompute import FullRecompute

LONGEST_PATTERN = 8
"""Layers of the longest pattern that is looked for (Gemma 3 repeats every 6)."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Layers that follow each other, and for how many such blocks they stand."""

    layers: range
    """Where they were before some were left out."""
    times: int = 1


def blocks_of(kinds: Sequence[Hashable], recompute: RecomputeConfig) -> list[Block]:
    """The layers to keep of those of these kinds: of repeated ones three blocks; whole groups that are recomputed."""
    groups = _groups(len(kinds), recompute)
    units = [(len(group) > 0 and again, tuple(kinds[layer] for layer in group)) for group, again in groups]
    found, start = [], 0
    while start < len(units):
        period, times = _repeat(units[start:])
        places = [groups[unit][0] for unit in range(start, start + period * times)]
        parts = [_joined(places[first : first + period]) for first in range(0, len(places), period)]
        if times > 3:
            parts = [parts[0], parts[1], parts[-1]]
        found += [
            Block(layers=part, times=times - 2 if len(parts) == 3 and number == 1 else 1)
            for number, part in enumerate(parts)
        ]
        start += period * times
    return found


def kept_recompute(blocks: Sequence[Block], count: int, recompute: RecomputeConfig) -> RecomputeConfig:
    """What recomputes the kept layers as `recompute` does all `count` of them."""
    if recompute.recompute_method != "block":
        return recompute
    again = {layer for group, is_group in _groups(count, recompute) if is_group for layer in group}
    kept = sum(layer in again for block in blocks for layer in block.layers)
    return recompute.model_copy(update={"recompute_num_layers": kept})


def _groups(count: int, recompute: RecomputeConfig) -> list[tuple[range, bool]]:
    """(layers, whether they are recomputed together) of a stage of `count` layers."""
    if recompute.recompute_granularity != "full":
        return [(range(layer, layer + 1), False) for layer in range(count)]
    runner, layers = FullRecompute(recompute, count, draws=False), range(count)
    return [(layers[group], True) for group in runner.groups] + [
        (range(layer, layer + 1), False) for layer in layers[runner.kept]
    ]


def _repeat(units: Sequence[Hashable]) -> tuple[int, int]:
    """(length, times) of the pattern that begins `units` and covers most of them; of equals the shortest."""
    best = (1, 1)
    for period in range(1, min(LONGEST_PATTERN, len(units) // 2) + 1):
        same = next((at for at in range(period, len(units)) if units[at] != units[at - period]), len(units))
        times = same // period
        if times > 1 and period * times > best[0] * best[1]:
            best = (period, times)
    return best


def _joined(parts: Sequence[range]) -> range:
    return range(parts[0].start, parts[-1].stop)


class MarkedRunner:
    """Takes the stream through the kept layers as `runner` does, and marks where a pass enters and leaves a block.

    `mark` gets for how many blocks that which follows stands. Layers that are run again in a backward pass mark
    nothing.
    """

    def __init__(self, runner: LayerRunner, blocks: Sequence[Block]) -> None:
        self._runner, self._blocks = runner, blocks
        self._is_forward = False
        self.mark: Callable[[int], None] = lambda _times: None

    def __call__(self, steps: Sequence[LayerStep], stream: Stream) -> Stream:
        """The stream after all `steps`."""
        marked, last = list(steps), -1
        for block in self._blocks:
            first, last = last + 1, last + len(block.layers)
            marked[first] = partial(self._enter, block, marked[first])
            marked[last] = partial(self._leave, block, marked[last])
        self._is_forward = True
        stream = self._runner(marked, stream)
        self._is_forward = False
        self.mark(1)
        return stream

    def in_blocks(self, groups: Sequence[Any], layers: nn.ModuleDict) -> Iterator[list[Any]]:
        """The groups of parameters of torch's split backward pass, layer by layer, each marked."""
        times = [block.times for block in self._blocks for _ in block.layers]
        place = {
            id(parameter): number for number, layer in enumerate(layers.values()) for parameter in layer.parameters()
        }

        def layer_of(group: Any) -> int | None:
            return next((place[id(node.variable)] for node in group["params"] if id(node.variable) in place), None)

        for number, some in groupby(groups, layer_of):
            self.mark(1 if number is None else times[number])
            yield list(some)

    def _enter(self, block: Block, step: LayerStep, stream: Stream) -> Stream:
        if self._is_forward:
            self.mark(block.times)
        return step(stream)

    def _leave(self, block: Block, step: LayerStep, stream: Stream) -> Stream:
        after = step(stream)
        if self._is_forward:
            for old, new in zip(stream, after, strict=True):
                if new is not old and new.requires_grad:
                    new.register_hook(lambda _gradient: self.mark(block.times))  # type: ignore[no-untyped-call]
        return after
