"""Which checkpoints of a run stay."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Retention:
    """A checkpoint that any of the rules wants stays; without a rule all do."""

    last: int | None = None
    """So many of the newest."""
    every: int | None = None
    """Those whose step is a multiple of it."""
    best: int | None = None
    """So many of those with the lowest value of a metric, among equal ones the newer."""

    @property
    def asks(self) -> bool:
        """Whether there is a rule."""
        return any(rule is not None for rule in (self.last, self.every, self.best))

    def kept(self, steps: Sequence[int], values: Mapping[int, float]) -> set[int]:
        """Of the steps of good checkpoints, ascending, those that stay; `values` has the metric where it is known.

        The newest always stays: something to go on from.
        """
        if not self.asks:
            return set(steps)
        kept = set(steps[-(self.last or 1) :])
        if self.every is not None:
            kept |= {step for step in steps if step % self.every == 0}
        if self.best is not None:
            known = [step for step in steps if step in values]
            kept |= set(sorted(known, key=lambda step: (values[step], -step))[: self.best])
        return kept
