"""The choices of a blend, many stretches of it at a time: step s takes the largest w_i * max(s, 1) - count_i.

Each choice depends on all before it, but only for a short while: the rule drives every start to the same path (greedy
error diffusion, whose invariant set tiles space: Adler et al., "Convex dynamics and applications", 2005). So a
blend is cut into stretches of steps, which are computed side by side from guessed counts. Where a stretch does not
end with the counts that the next one began with, the next is computed again from those. What comes out is proven step
by step from the first one; the guess decides the speed only.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Choices = npt.NDArray[np.int16]
Marks = npt.NDArray[np.unsignedinteger[Any]]

WARMUP = 64
"""Steps before a stretch in which a guess finds to the path, at least; each dataset is to be chosen some times."""
STRETCH = 16
"""Steps of a stretch, in warmups."""
_CELLS = 1 << 15
"""Datasets x stretches at a time: what stays in the cache of a core."""
_MAX_WIDTH, _MIN_WIDTH = 8192, 64
_FEW = 12
"""Up to so many datasets it is faster to add to all counts than to the one of each stretch."""
_ATTEMPTS = 8
"""How often stretches that do not fit together are mended."""
_PATIENCE = 1 << 16
"""Steps to go one by one when that was not enough."""


def weighted_choices(shares: Floats, size: int) -> Choices:
    """The dataset of each of `size` steps, int16, for positive shares [num_datasets]; ties go to the first.

    Computed in float64 and in the order of operations of Megatron's build_blending_indices.
    """
    return _choices(shares, size)[0]


def exhaustive_choices(sizes: npt.NDArray[np.int64]) -> Choices:
    """The dataset of each step until all of positive `sizes` are used up, int16.

    As Megatron's build_exhaustive_blending_indices, with shares in proportion to the sizes.
    A dataset that is used up lags less than none, and some other one more: it is not chosen but for rounding.
    """
    total = int(sizes.sum())
    shares = sizes / float(total)
    chosen, counts = _choices(shares, total)
    if (counts != sizes).any():
        excess = [np.flatnonzero(chosen == number)[sizes[number]] for number in np.flatnonzero(counts > sizes)]
        first = int(min(excess))
        counts = np.bincount(chosen[:first], minlength=len(sizes)).astype(np.float64)
        _one_by_one(shares, counts, chosen, first, total, sizes)
    return chosen


def _choices(shares: Floats, size: int) -> tuple[Choices, Floats]:
    """The choices and how often each dataset is chosen."""
    chosen = np.empty(size, dtype=np.int16)
    counts, peaks, step = np.zeros(len(shares)), np.full(len(shares), 0.5), 0
    width, limit = _MIN_WIDTH, min(_MAX_WIDTH, max(_MIN_WIDTH, _CELLS // len(shares)))
    patience = _PATIENCE
    warmup = max(WARMUP, 4 * len(shares))
    length = STRETCH * warmup
    while step < size:
        width = min(width, -(-(size - step) // length))
        marks, ends = _side_by_side(shares, counts, peaks, step + length * np.arange(width, dtype=np.float64), warmup)
        stop = step + marks.size
        if stop > size:  # the counts at the end are wanted, not those of the last stretch
            ends[:, -1] = counts + np.bincount(len(shares) - marks.T.reshape(-1)[: size - step], minlength=len(shares))
        np.subtract(len(shares), marks.T.reshape(-1)[: size - step], out=chosen[step:stop], casting="unsafe")
        counts = ends[:, -1].copy()
        peaks = (shares[:, None] * (step + length * np.arange(1, ends.shape[1] + 1)) - ends).mean(axis=1) + 0.5
        proven, step, width = ends.shape[1] == width, min(stop, size), min(limit, 4 * width)
        if not proven:  # weights very far apart: errors of a guess live long
            stop = min(step + patience, size)
            _one_by_one(shares, counts, chosen, step, stop)
            patience, step, width = 2 * patience, stop, _MIN_WIDTH
    return chosen, counts


def _side_by_side(shares: Floats, counts: Floats, peaks: Floats, starts: Floats, warmup: int) -> tuple[Marks, Floats]:
    """The marks [length, width] of the stretches from `starts` and the counts [num_datasets, width] after each.

    Fewer stretches when the guesses do not fit together. Phases: guess the counts at all starts, compute all stretches,
    mend those that do not fit.
    """
    length = STRETCH * warmup
    begins = _guess(shares, peaks, starts - warmup)
    _, begins = _run(shares, begins, starts - warmup, warmup)
    begins[:, 0] = counts
    marks, ends = _run(shares, begins, starts, length)
    for attempt in range(_ATTEMPTS):
        breaks = np.flatnonzero((ends[:, :-1] != begins[:, 1:]).any(axis=0)) + 1
        if not len(breaks):
            return marks, ends
        if attempt == _ATTEMPTS - 1:
            break
        # A dataset of small weight that a guess draws too early or late is wrong for many stretches: reach further.
        again, cause = _reach(breaks, 4**attempt, len(starts))
        begins[:, again] += (ends[:, breaks - 1] - begins[:, breaks])[:, cause]
        marks[:, again], ends[:, again] = _run(shares, begins[:, again], starts[again], length)
    return marks[:, : breaks[0]], ends[:, : breaks[0]]


def _guess(shares: Floats, peaks: Floats, steps: Floats) -> Floats:
    """Likely counts [num_datasets, width] before `steps`: each lag is at most one below its peak, where it is drawn.

    They sum to the step, as true counts do.
    """
    wanted = shares[:, None] * steps + (1 - peaks[:, None])
    counts = np.floor(wanted)
    rank = (counts - wanted).argsort(axis=0).argsort(axis=0)  # 0: nearest to the next number
    short = steps - counts.sum(axis=0)
    counts += rank < short
    counts -= rank >= len(shares) + np.minimum(short, 0)
    return counts


def _reach(breaks: npt.NDArray[np.int64], reach: int, width: int) -> tuple[npt.NDArray[np.int64], ...]:
    """(stretches from each break to the next one, at most `reach`; which break each belongs to)."""
    columns = np.arange(breaks[0], width)
    cause = np.searchsorted(breaks, columns, side="right") - 1
    near = columns - breaks[cause] < reach
    return columns[near], cause[near]


def _run(shares: Floats, counts: Floats, starts: Floats, length: int) -> tuple[Marks, Floats]:
    """The marks [length, width] of `length` steps from each of `starts`, and the counts after them.

    The mark of dataset i is num_datasets - i, so that the first of equals has the largest.
    """
    counts, steps, column = counts.copy(), starts.copy(), shares[:, None]
    num_datasets, width = counts.shape
    marks = np.empty((length, width), dtype=np.uint8 if num_datasets < 256 else np.uint16)
    numbers = np.arange(num_datasets, 0, -1, dtype=marks.dtype)[:, None]
    lags, largest = np.empty_like(counts), np.empty(width)
    drawn = np.empty(counts.shape, dtype=np.bool_)
    candidates = np.empty(counts.shape, dtype=marks.dtype)
    flat, cell, last = counts.reshape(-1), np.empty(width, dtype=np.int64), np.arange(width) + num_datasets * width
    scale = np.maximum(steps, 1.0)
    for number in range(length):
        np.multiply(column, scale, out=lags)
        np.subtract(lags, counts, out=lags)
        np.maximum.reduce(lags, axis=0, out=largest)
        np.equal(lags, largest, out=drawn)
        np.multiply(drawn.view(np.uint8), numbers, out=candidates)
        mark = np.maximum.reduce(candidates, axis=0, out=marks[number])
        if num_datasets <= _FEW:
            np.equal(candidates, mark, out=drawn)
            np.add(counts, drawn, out=counts)
        else:
            np.multiply(mark, np.int64(-width), out=cell)
            np.add(cell, last, out=cell)
            flat[cell] += 1
        steps += 1
        scale = steps
    return marks, counts


def _one_by_one(
    shares: Floats,
    counts: Floats,
    chosen: Choices,
    start: int,
    stop: int,
    sizes: npt.NDArray[np.int64] | None = None,
) -> None:
    """Chooses for steps start .. stop, after which `counts` are; with `sizes` a dataset is left out once used up."""
    limits = np.full(len(shares), np.inf) if sizes is None else sizes
    lag = np.empty_like(shares)
    left_out = np.where(counts >= limits, np.inf, counts)  # an infinite count never lags
    for step in range(start, stop):
        np.multiply(shares, float(step or 1), out=lag)
        np.subtract(lag, left_out, out=lag)
        chosen[step] = dataset = int(lag.argmax())
        counts[dataset] += 1
        left_out[dataset] = counts[dataset] if counts[dataset] < limits[dataset] else np.inf
