"""Samples of each optimizer step as a pure function of the samples used before it, so that resuming needs no state."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

MOST_SIZES = 10_000
"""Different batch sizes of a run."""
_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class BatchSchedule:
    """Global batch sizes: (sample from which it counts, size), ascending, the first from sample 0."""

    stages: tuple[tuple[int, int], ...]

    @classmethod
    def ramp(cls, start: int, increment: int, samples: int, end: int) -> "BatchSchedule":
        """From `start` to `end` in steps of `increment`, which are equally long, over `samples` (Megatron's
        --rampup-batch-size): start + increment x floor(consumed x increments / samples).
        """
        count = (end - start) // increment
        if count < 1:
            return cls(((0, end),))
        found = {-(-number * samples // count): start + number * increment for number in range(count + 1)}
        return cls(tuple(found.items()))

    @property
    def sizes(self) -> tuple[int, ...]:
        """All sizes, in their order."""
        return tuple(size for _, size in self.stages)

    @property
    def divisor(self) -> int:
        """The largest number that divides every size."""
        return math.gcd(*self.sizes)

    def size(self, consumed_samples: int) -> int:
        """Samples of the step that follows `consumed_samples`."""
        return next(size for first, size in reversed(self.stages) if first <= consumed_samples)

    def steps(self, start: int, stop: int) -> tuple[int, int]:
        """(whole steps that samples start..stop have, the sample at which the last of them ends)."""
        steps = 0
        for until, size in self._sections(stop):
            count = min(-(-max(0, until - start) // size), max(0, stop - start) // size)
            steps, start = steps + count, start + count * size
            if start < until:  # the next step would end after `stop`
                break
        return steps, start

    def _sections(self, stop: int) -> Iterator[tuple[int, int]]:
        """(sample at which the next size begins, size)."""
        for (_, size), (until, _) in pairwise(self.stages):
            yield until, size
        yield max(stop, self.stages[-1][0]) + 1, self.stages[-1][1]


def read_step_schedule(text: str, seq_length: int) -> BatchSchedule:
    """`0:16 2.4B:320`: from so many tokens on, so many samples a step (Megatron's --step-batch-size-schedule).

    Raises:
        ValueError: it is not of this form; the text says the rule.
    """
    stages = []
    for entry in text.replace(",", " ").split():
        threshold, colon, size = entry.partition(":")
        if not colon:
            raise ValueError(f'"{entry}" must be TOKENS:SAMPLES')
        stages.append((_number(threshold) // seq_length, _number(size)))
    stages.sort()
    if len(stages) > MOST_SIZES:
        raise ValueError(f"has more than {MOST_SIZES} sizes")
    if not stages or stages[0][0] != 0:
        raise ValueError("must begin with the size of the first steps, as 0:256")
    if any(first == second for (first, _), (second, _) in pairwise(stages)):
        raise ValueError("has two sizes from the same sample on")
    if min(size for _, size in stages) < 1:
        raise ValueError("has a size below 1")
    return BatchSchedule(tuple(stages))


def _number(word: str) -> int:
    """A whole number, perhaps with K, M, B or T for thousands, millions, ..."""
    digits, factor = (word[:-1], _SUFFIXES[word[-1].upper()]) if word[-1:].upper() in _SUFFIXES else (word, 1)
    try:
        value = float(digits)
    except ValueError:
        raise ValueError(f'has "{word}", which is no number (with K, M, B or T)') from None
    if not 0 <= value * factor < 2**62:
        raise ValueError(f'has "{word}", which must not be negative or above 2^62')
    return int(value * factor)
