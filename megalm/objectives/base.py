"""What an objective is: a pure function of a numbered sample, with what loader and model must know of its examples."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt

from megalm.config.sections import RunConfig

Example = dict[str, npt.NDArray[Any]]
"""One batch row: arrays by the names of `Objective.fields`."""


Statistics = Mapping[str, tuple[float, float]]
"""What is counted of a batch, by name: (sum, what it is divided by)."""


def filled(values: npt.NDArray[Any], length: int, filler: float) -> npt.NDArray[Any]:
    """`values`, then `filler` up to `length`."""
    return np.concatenate([values, np.full(length - len(values), filler, dtype=values.dtype)])


class Field(NamedTuple):
    """What every example holds under one name."""

    shape: tuple[int, ...]
    """Without the batch: [B, *shape] in a batch."""
    dtype: npt.DTypeLike

    @property
    def dtype_name(self) -> str:
        """As numpy and torch both call it."""
        return np.dtype(self.dtype).name


class Sample(Protocol):
    """Some consecutive tokens of a dataset."""

    @property
    def number(self) -> int:
        """Its number in the run: all that is drawn for it follows from this and the seed."""

    @property
    def dataset(self) -> int:
        """Which dataset of a blend it comes from."""

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """[sample_tokens], -1 where the data does not fill it."""


class Documents(Protocol):
    """The documents that the samples of a dataset are of."""

    def other_text(self, number: int, length: int, draw: np.random.Generator) -> npt.NDArray[np.int64]:
        """Up to `length` tokens of a document that no token of sample `number` is of."""


@runtime_checkable
class UsesDocuments(Protocol):
    """An objective that may look at other documents than those of a sample."""

    @property
    def needs_documents(self) -> bool:
        """Whether it does."""

    def with_documents(self, documents: Documents) -> "Transform":
        """The objective that takes them from there."""


@runtime_checkable
class HasStatistics(Protocol):
    """A transform that says of batches what it has made of them."""

    def statistics(self, batch: Mapping[str, npt.NDArray[Any]]) -> Statistics:
        """What is counted of a batch, [B, ...] each; some operations of numpy, since it is every batch of a rank."""


class Transform(Protocol):
    """Turns samples into examples; frozen and picklable."""

    @property
    def shared_tokens(self) -> int:
        """How many tokens of a sample are also the first ones of the next (1 for a label beyond the input)."""

    def sample_tokens(self, seq_length: int) -> int:
        """How many tokens of the data an example takes where the model gets `seq_length`."""

    def fields(self, seq_length: int) -> Mapping[str, Field]:
        """What an example holds, by name: what loader, planner and pipeline know of it."""

    def __call__(self, sample: Sample) -> Example:
        """The arrays of one batch row; `sample` is not changed, but they may be views of it.

        The same sample gives the same example in every process.
        """


class Objective(Transform, Protocol):
    """A transform that a run's settings may name: an entry of `OBJECTIVES`."""

    special_tokens: ClassVar[tuple[str, ...]]
    """Names of the tokenizer's special tokens that `build` gets the ids of ("eod", "mask", ...)."""

    @classmethod
    def build(cls, config: RunConfig, special: Mapping[str, int | None]) -> Self:
        """The objective of a run; `special` holds the ids of `special_tokens`, None for what the tokenizer lacks.

        Raises:
            ConfigError: settings that do not fit it, or a token that it needs and the tokenizer lacks.
        """
