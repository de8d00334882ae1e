"""Which dataset of a blend sample number s comes from: Megatron's greedy rule, equal to its arrays.

Step s goes to the dataset that lags its share the most: the largest w_i * max(s, 1) - count_i, the first of equals,
in float64 and in this order of operations (see `greedy`).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megalm.data.tokenizers.greedy import exhaustive_choices, weighted_choices
from megalm.errors import DataError
from megalm.storage.whole_file import WholeFile, require_whole

SURPLUS = 0.005
"""Share by which each dataset of a weighted blend is built larger than its target (`mid_level_dataset_surplus`)."""
MAX_DATASETS = 32767
"""Dataset numbers are int16."""


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


def _check_number(num_datasets: int) -> None:
    if num_datasets >= MAX_DATASETS:
        raise DataError(f"{num_datasets} datasets in one blend; at most {MAX_DATASETS - 1}: `megalm merge` joins some")


class Blend:
    """The dataset and the sample number in it of each step of a blend.

    Args:
        dataset_index: dataset number of each step, int16 [size].
        mapped: the files that it is mapped from.
    """

    BLOCK = 4096

    def __init__(
        self, dataset_index: npt.NDArray[np.int16], num_datasets: int, mapped: Sequence[WholeFile] = ()
    ) -> None:
        self.dataset_index, self.num_datasets, self._mapped = dataset_index, num_datasets, mapped

    @classmethod
    def weighted(cls, weights: Sequence[float], size: int) -> "Blend":
        """`size` steps in proportion to `weights`, which are normalized (Megatron's build_blending_indices)."""
        _check_number(len(weights))
        if len(weights) == 1:
            return cls(np.zeros(size, dtype=np.int16), 1)
        return cls(weighted_choices(np.asarray(normalize(weights)), size), len(weights))

    @classmethod
    def exhaustive(cls, sizes: Sequence[int]) -> "Blend":
        """Every sample of every dataset once, in proportion (Megatron's build_exhaustive_blending_indices)."""
        _check_number(len(sizes))
        there = np.flatnonzero(sizes).astype(np.int16)
        if len(there) < 2:
            return cls(np.repeat(there, sum(sizes)), len(sizes))
        chosen = exhaustive_choices(np.asarray(sizes, dtype=np.int64)[there])
        return cls(chosen if len(there) == len(sizes) else there[chosen], len(sizes))

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.dataset_index)

    def locate(self, step: int) -> tuple[int, int]:
        """(dataset number, how many earlier steps went to it) of one step."""
        if self.num_datasets == 1:
            return 0, step
        require_whole(self._mapped)
        dataset = int(self.dataset_index[step])
        block = step // self.BLOCK
        inside = int(np.count_nonzero(self.dataset_index[block * self.BLOCK : step] == dataset))
        return dataset, int(self._counts[block, dataset]) + inside

    def counts(self, steps: int) -> list[int]:
        """How many of the first `steps` steps go to each dataset."""
        if self.num_datasets == 1:
            return [steps]
        require_whole(self._mapped)
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
