"""What a run has besides tensors that outlives a step: how far it is, and how its samples are drawn."""

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

from megalm.data.samples.blended_dataset import BlendedDataset, OrderRecord
from megalm.data.samples.sample import SampleDataset
from megalm.storage.documents import Count, validated


class Stateful(Protocol):
    """What has state, besides tensors, that outlives a step: who is one is saved and continued with the run."""

    @property
    def name(self) -> str:
        """Under which the checkpoint keeps its state."""

    def state(self) -> dict[str, Any]:
        """What JSON can hold of it."""

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""


@dataclass
class Progress:
    """How far a run is."""

    name: ClassVar[str] = "progress"
    step: Count = 0
    """Optimizer steps done, skipped ones included."""
    consumed_samples: Count = 0
    """Training samples used: the number of the next sample."""
    skipped_iterations: Count = 0
    """Steps whose gradients were not finite."""
    nan_iterations: Count = 0
    """Steps whose loss was not finite."""
    bad_in_a_row: Count = 0
    """Skipped steps since the last good one of this start."""
    nan_in_a_row: Count = 0
    """Steps since the last one of this start whose loss was finite."""
    samples_in_a_row: Count = 0
    """Samples of the `bad_in_a_row` steps."""

    def count(self, loss: float, skipped: bool, samples: int) -> None:
        """One more step; a skipped one uses up its samples and its place in the schedule like any other."""
        self.step += 1
        self.consumed_samples += samples
        self.skipped_iterations += skipped
        self.nan_iterations += not math.isfinite(loss)
        self.bad_in_a_row = self.bad_in_a_row + 1 if skipped else 0
        self.samples_in_a_row = self.samples_in_a_row + samples if skipped else 0
        self.nan_in_a_row = 0 if math.isfinite(loss) else self.nan_in_a_row + 1

    @property
    def is_sound(self) -> bool:
        """Whether the last step was taken, and its loss was finite."""
        return not self.bad_in_a_row and not self.nan_in_a_row

    def state(self) -> dict[str, Any]:
        """All counters but those of this start alone."""
        return {name: value for name, value in asdict(self).items() if not name.endswith("_in_a_row")}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave; bad steps in a row count anew, or a run could never get beyond them."""
        known = validated(Progress, state)
        for counter in asdict(known).keys() & state.keys():
            setattr(self, counter, getattr(known, counter))
        self.bad_in_a_row = self.nan_in_a_row = self.samples_in_a_row = 0


@dataclass
class SampleOrder:
    """How the training samples are drawn. What was saved of it decides how the data is laid out, and so comes first."""

    name: ClassVar[str] = "order"
    progress: Progress
    record: OrderRecord | None = None
    """How the samples were drawn up to the checkpoint."""
    dataset: SampleDataset | None = None
    """The samples, laid out accordingly."""

    def state(self) -> dict[str, Any]:
        """The record of the samples that are used; empty where their number says all."""
        if not isinstance(self.dataset, BlendedDataset):
            return {}
        return asdict(self.dataset.record(self.progress.consumed_samples))

    def load(self, state: dict[str, Any]) -> None:
        """The record that the dataset is to be built by."""
        self.record = OrderRecord.from_json(state) if state else None
