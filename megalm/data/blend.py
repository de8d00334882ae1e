"""Which dataset of a blend sample number s comes from: Megatron's greedy rule, equal to its arrays.

Step s goes to the dataset that lags its share the most: the largest w_i * max(s, 1) - count_i, the first of equals,
in float64 and in this order of operations. Each choice depends on all before it, so a blend is computed step by step
(0.4 microseconds a step for two datasets, 1.8 for twenty and more).
"""

import array
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SURPLUS = 0.005
"""Share by which each dataset of a weighted blend is built larger than its target (`mid_level_dataset_surplus`)."""
MAX_DATASETS = 32767
"""Dataset numbers are int16."""
_FEW = 20
"""Up to so many datasets plain Python is faster than numpy."""


def normalize(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum, as Megatron does it: numpy's float64 sum."""
    values = np.asarray(weights, dtype=np.float64)
    shares: list[float] = (values / np.sum(values)).tolist()
    return shares


@dataclass(frozen=True)
class BlendSizes:
    """How many samples of each dataset a weighted blend of some size uses and builds."""

    targets: list[int]
    """Samples of each dataset; their sum is Megatron's size of the blend, at least the one asked for."""
    requests: list[int]
    """Samples that each dataset is built for: the target and the surplus."""

    @classmethod
    def of(cls, weights: Sequence[float], size: int) -> "BlendSizes":
        """The sizes for `size` samples and normalized weights."""
        targets = [math.ceil(size * weight) for weight in weights]
        return cls(targets, [math.ceil(target * (1 + SURPLUS)) for target in targets])


class Blend:
    """The dataset and the sample number in it of each step of a blend.

    Args:
        dataset_index: dataset number of each step, int16 [size].
    """

    BLOCK = 4096

    def __init__(self, dataset_index: npt.NDArray[np.int16], num_datasets: int) -> None:
        self.dataset_index, self.num_datasets = dataset_index, num_datasets

    @classmethod
    def weighted(cls, weights: Sequence[float], size: int) -> "Blend":
        """`size` steps in proportion to `weights`, which are normalized (Megatron's build_blending_indices)."""
        return cls(_greedy(normalize(weights), size, None), len(weights))

    @classmethod
    def exhaustive(cls, sizes: Sequence[int]) -> "Blend":
        """Every sample of every dataset once, in proportion (Megatron's build_exhaustive_blending_indices)."""
        total = sum(sizes)
        return cls(_greedy([size / float(total) for size in sizes], total, sizes), len(sizes))

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.dataset_index)

    def locate(self, step: int) -> tuple[int, int]:
        """(dataset number, how many earlier steps went to it) of one step."""
        if self.num_datasets == 1:
            return 0, step
        dataset = int(self.dataset_index[step])
        block = step // self.BLOCK
        inside = int(np.count_nonzero(self.dataset_index[block * self.BLOCK : step] == dataset))
        return dataset, int(self._counts[block, dataset]) + inside

    def counts(self, steps: int) -> list[int]:
        """How many of the first `steps` steps go to each dataset."""
        if self.num_datasets == 1:
            return [steps]
        block = steps // self.BLOCK
        rest = np.bincount(self.dataset_index[block * self.BLOCK : steps], minlength=self.num_datasets)
        total: list[int] = (self._counts[block] + rest).tolist()
        return total

    def dataset_sample_index(self) -> npt.NDArray[np.int64]:
        """Megatron's second array: for each step how many earlier ones went to the same dataset, int64 [size]."""
        numbers = np.empty(len(self), dtype=np.int64)
        for dataset in range(self.num_datasets):
            steps = np.flatnonzero(self.dataset_index == dataset)
            numbers[steps] = np.arange(len(steps))
        return numbers

    @functools.cached_property
    def _counts(self) -> npt.NDArray[np.int64]:
        """Steps of each dataset before each block, int64 [num_blocks + 1, num_datasets]."""
        starts = range(0, len(self), self.BLOCK)
        counts = np.zeros((len(self) // self.BLOCK + 1, self.num_datasets), dtype=np.int64)
        for block, start in enumerate(starts[: len(counts) - 1], 1):
            counts[block] = np.bincount(self.dataset_index[start : start + self.BLOCK], minlength=self.num_datasets)
        return np.cumsum(counts, axis=0, out=counts)


def _greedy(weights: list[float], size: int, sizes: Sequence[int] | None) -> npt.NDArray[np.int16]:
    """`size` choices; with `sizes` a dataset is left out as soon as it is used up."""
    assert 0 < len(weights) < MAX_DATASETS, f"{len(weights)} datasets in one blend"
    if len(weights) == 1:
        return np.zeros(size, dtype=np.int16)
    if len(weights) <= _FEW:
        return _greedy_few(weights, size, sizes)
    chosen = np.empty(size, dtype=np.int16)
    shares, counts = np.asarray(weights), np.zeros(len(weights))
    if sizes is not None:
        counts[np.asarray(sizes) == 0] = np.inf  # an infinite count never lags
    lag = np.empty(len(weights))
    for step in range(size):
        np.multiply(shares, float(max(step, 1)), out=lag)
        np.subtract(lag, counts, out=lag)
        chosen[step] = dataset = int(lag.argmax())
        counts[dataset] += 1
        if sizes is not None and counts[dataset] == sizes[dataset]:
            counts[dataset] = np.inf
    return chosen


def _greedy_few(weights: list[float], size: int, sizes: Sequence[int] | None) -> npt.NDArray[np.int16]:
    chosen = array.array("h", bytes(2 * size))
    counts = [0.0] * len(weights)
    if sizes is not None:
        counts = [0.0 if number else math.inf for number in sizes]
    for step in range(size):
        scale = float(step or 1)
        most, dataset = -math.inf, 0
        for number, weight in enumerate(weights):
            lag = weight * scale - counts[number]
            if lag > most:
                most, dataset = lag, number
        chosen[step] = dataset
        counts[dataset] += 1
        if sizes is not None and counts[dataset] == sizes[dataset]:
            counts[dataset] = math.inf
    return np.frombuffer(chosen, dtype=np.int16) if size else np.empty(0, dtype=np.int16)
