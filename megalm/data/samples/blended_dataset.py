"""The samples of a run: one or many datasets, in an order that a checkpoint can record and a later start go on with."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.data.samples.blend import Blend, BlendSizes, normalize
from megalm.data.samples.content import ContentRecord
from megalm.data.samples.index_cache import IndexCache
from megalm.data.samples.sample import Sample
from megalm.data.samples.source import Layout, Request, Source
from megalm.errors import CheckpointError, DataError
from megalm.storage.documents import validated


@dataclass(frozen=True, kw_only=True)
class DatasetRecord:
    """What is recorded of one dataset."""

    data: str
    """The key of its source."""
    requests: list[Request]
    """What its layouts were built for, in order."""
    base: int
    """Samples of it that were used before the present blend began."""
    consumed: int
    """Samples of it that are used."""
    content: ContentRecord = field(default_factory=ContentRecord)
    """What else its tokens are known by."""

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "DatasetRecord":
        """The record that `dataclasses.asdict` made; one of before has no content."""
        return cls(**content | {"content": ContentRecord(**content.get("content", {}))})


@dataclass(frozen=True, kw_only=True)
class OrderRecord:
    """How far each dataset of a run is used, and the blend that the run draws with: what a checkpoint holds of it."""

    weights: list[float] | None
    """Weights of the blend as they were given."""
    start: int
    """Number of the sample at which this blend began."""
    consumed: int
    """Samples that are used."""
    datasets: list[DatasetRecord]

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "OrderRecord":
        """The record that `dataclasses.asdict` made.

        Raises:
            DocumentError: it is none.
        """
        return validated(cls, content)


class BlendedDataset:
    """Numbered samples from one or more sources.

    From the start: one source is Megatron's GPTDataset; several are its BlendedDataset, by `weights` or else in
    proportion to their sizes, one epoch of each. After a `record`: the same blend goes on when sources and weights are
    the recorded ones. Otherwise a new one begins at the recorded sample, and each source goes on where it was. Either
    way no sample of an epoch is drawn twice or left out, whatever `num_samples` is.

    Args:
        num_samples: samples from the first one of the run on; None is one epoch of each source, all of it.
        capped: be content with one epoch of each, when there are no weights and that is less.
        record: what a checkpoint says; the samples before it are not available.
        allow_changed: accept sources that the record does not know (they start at 0), and the lack of others.
        verify: compare each source with all that the record knows of its content, which may read all of it.

    Raises:
        DataError: sources without a sample, or too few samples without weights.
        CheckpointError: other sources than the record's.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] | None,
        num_samples: int | None,
        *,
        capped: bool = False,
        record: OrderRecord | None = None,
        allow_changed: bool = False,
        verify: bool = True,
    ) -> None:
        assert num_samples is not None or weights is None or len(sources) == 1, "whole datasets have no weights"
        self._sources, self.num_datasets = sources, len(sources)
        self._weights = None if weights is None else list(weights)
        self._keys = _keys(sources)
        known = {} if record is None else {dataset.data: dataset for dataset in record.datasets}
        if record is not None and not allow_changed:
            _check_same_data(sources, self._keys, record)
            for source, key in zip(sources, self._keys, strict=True) if verify else ():
                known[key].content.check(source.indexed.prefix)
        go_on = record is not None and record.weights == self._weights and list(known) == self._keys
        new = DatasetRecord(data="", requests=[], base=0, consumed=0)
        records = [known.get(key, new) for key in self._keys]
        self.start = 0 if record is None else record.start if go_on else record.consumed
        self._bases = [dataset.base if go_on else dataset.consumed for dataset in records]
        size = None if num_samples is None else max(0, num_samples - self.start)
        requests, self._blend = self._plan(sources, size, records, capped=capped, fresh=record is None)
        counts = self._blend.counts(len(self._blend))
        self._layouts: list[Layout] = [
            source.lay_out(wanted, base + count, dataset.consumed)
            for source, wanted, base, count, dataset in zip(
                sources, requests, self._bases, counts, records, strict=True
            )
        ]

    def _plan(
        self, sources: Sequence[Source], size: int | None, records: list[DatasetRecord], *, capped: bool, fresh: bool
    ) -> tuple[list[list[Request]], Blend]:
        """What each source is laid out for, and the blend of them."""
        requests = [
            source.begun(dataset.requests, dataset.consumed) for source, dataset in zip(sources, records, strict=True)
        ]
        cache = sources[0].sampling.cache
        if self._weights is not None and size is not None:
            shares = normalize(self._weights)
            if not fresh:
                return requests, _weighted(shares, size, cache)
            sizes = BlendSizes.of(shares, size)
            return [[request] for request in sizes.requests], _weighted(shares, sum(sizes.targets), cache)
        if len(sources) == 1 and size is not None:
            return [[size]] if fresh else requests, Blend.weighted([1.0], size)
        requests = [wanted or [None] for wanted in requests]
        lengths = [sum(map(source.num_samples, wanted)) for source, wanted in zip(sources, requests, strict=True)]
        left = [max(0, length - base) for length, base in zip(lengths, self._bases, strict=True)]
        if size is None:
            return requests, Blend.exhaustive(left)
        if size > sum(left) and not capped:
            raise DataError(
                f"{len(sources)} datasets without weights has {sum(left)} samples in one epoch of each "
                f"({', '.join(map(str, left))}), but {size} are wanted; give weights (WEIGHT PREFIX WEIGHT PREFIX) to "
                "repeat them as needed, or shorten the run"
            )
        if all(left):
            return requests, _weighted(normalize(left), min(size, sum(left)), cache)
        return requests, Blend.exhaustive(left)

    def __len__(self) -> int:
        """One more than the last sample number; at least what was asked for, unless capped."""
        if self.num_datasets == 1 and self._weights is None:
            return self.start - self._bases[0] + len(self._layouts[0])
        return self.start + len(self._blend)

    def __getitem__(self, number: int) -> Sample:
        """Sample `number`, with the position of the dataset that it comes from.

        Raises:
            IndexError: no such sample, or one before the record.
            DataError: the files changed or cannot be read.
        """
        dataset, inside = self._locate(number)
        return Sample(number, dataset, self._layouts[dataset][inside].tokens)

    def other_text(self, number: int, length: int, draw: np.random.Generator) -> npt.NDArray[np.int64]:
        """Up to `length` tokens of another document of the dataset that sample `number` comes from.

        Raises:
            DataError: there is none.
        """
        dataset, inside = self._locate(number)
        return self._sources[dataset].text(self._layouts[dataset].sequences(inside), length, draw)

    def record(self, consumed: int) -> OrderRecord:
        """What a checkpoint after `consumed` samples holds."""
        counts = [consumed - self.start] if self.num_datasets == 1 else self._blend.counts(consumed - self.start)
        return OrderRecord(
            weights=self._weights,
            start=self.start,
            consumed=consumed,
            datasets=[
                DatasetRecord(
                    data=key, requests=layout.requests, base=base, consumed=base + count, content=source.content
                )
                for source, key, layout, base, count in zip(
                    self._sources, self._keys, self._layouts, self._bases, counts, strict=True
                )
            ],
        )

    @property
    def samples_per_epoch(self) -> int:
        """Samples of all datasets together, each taken once."""
        return sum(source.num_samples(None) for source in self._sources)

    @property
    def layouts(self) -> list[Layout]:
        """The numbered samples of each dataset."""
        return self._layouts

    @property
    def blend(self) -> Blend:
        """Which dataset each sample comes from."""
        return self._blend

    def _locate(self, number: int) -> tuple[int, int]:
        if not self.start <= number < len(self):
            raise IndexError(f"sample {number} of {self.start} .. {len(self)}")
        step = number - self.start
        dataset, inside = (0, step) if self.num_datasets == 1 else self._blend.locate(step)
        return dataset, self._bases[dataset] + inside


def _weighted(shares: list[float], size: int, cache: IndexCache | None) -> Blend:
    """The weighted blend, from the cache if there is one."""
    if cache is None or len(shares) == 1:
        return Blend.weighted(shares, size)
    built = cache.get(
        {"blend": shares, "size": size}, lambda: {"dataset_index": Blend.weighted(shares, size).dataset_index}
    )
    return Blend(built["dataset_index"], len(shares), built.files)


def _keys(sources: Sequence[Source]) -> list[str]:
    """The keys of the sources; the same data given again has its number behind."""
    keys: list[str] = []
    for source in sources:
        again = sum(key.partition("#")[0] == source.key for key in keys)
        keys.append(source.key + (f"#{again + 1}" if again else ""))
    return keys


def _check_same_data(sources: Sequence[Source], keys: list[str], record: OrderRecord) -> None:
    known = [dataset.data for dataset in record.datasets]
    new = [source.indexed.prefix for source, key in zip(sources, keys, strict=True) if key not in known]
    gone = [f"{dataset.data:.12} ({dataset.consumed} samples used)" for dataset in record.datasets
            if dataset.data not in keys]  # fmt: skip
    if new or gone:
        texts = [f"{prefix} is not a dataset that the run began with" for prefix in new]
        texts += [f"the dataset with fingerprint {text} is gone" for text in gone]
        raise CheckpointError(
            f"{'; '.join(texts)}; restore the data, start a new run (another --save), or continue with "
            "--allow-changed-data: datasets that stay go on where they were, new ones start at their beginning"
        )
