"""A numbered sample, and what gives them."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

PAD = -1
"""Fills a sample that the data does not fill; never a token id, so no real token is taken for padding."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Some consecutive tokens of a dataset: what an objective makes an example of."""

    number: int
    """Its number in the dataset that gave it; in a run, what everything drawn for it follows from."""
    dataset: int
    """Which dataset of a blend it comes from; 0 where there is one only."""
    tokens: npt.NDArray[np.int64]
    """[sample_tokens], -1 where the data does not fill it."""


class SampleDataset(Protocol):
    """Numbered samples: what a loader reads. Number k is the same sample in every process; picklable."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, number: int) -> Sample:
        """One sample."""


@runtime_checkable
class HasDocuments(Protocol):
    """A dataset that knows the documents that its samples are of."""

    def other_text(self, number: int, length: int, draw: np.random.Generator) -> npt.NDArray[np.int64]:
        """Up to `length` tokens, from anywhere in a document that no token of sample `number` is of.

        Raises:
            DataError: there is no other document.
        """
