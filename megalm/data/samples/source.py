"""One dataset of a run: documents of an indexed dataset, and the samples that are laid out from them."""

import bisect
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from megalm.data.indexed.reader import IndexedDataset
from megalm.data.samples.content import ContentRecord
from megalm.data.samples.gpt_dataset import GPTDataset
from megalm.data.samples.index_cache import IndexCache
from megalm.data.samples.sample import PAD, HasDocuments, Sample, SampleDataset
from megalm.data.samples.stream import ConsecutiveDataset, StreamDataset
from megalm.errors import DataError
from megalm.randomness import stable_seed_32

Request = int | None
"""Samples that a layout was built for; None is one epoch. It decides the order of the samples (see `plan_epochs`)."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How samples are cut and ordered; equal for all datasets of a run."""

    seq_length: int
    """Tokens from the start of one sample to that of the next."""
    extra_tokens: int = 1
    """Tokens of a sample beyond them, which it shares with the next one (1: the last label of a causal model)."""
    seed: int
    order: Literal["shuffle", "stream", "consecutive"] = "shuffle"
    rows: int = 1
    """consecutive: samples of a global batch, of which each reads on."""
    cache: IndexCache | None = None


@dataclass(frozen=True)
class Source:
    """Some documents of an indexed dataset.

    Raises:
        DataError (from what builds samples): fewer tokens than one sample.
    """

    indexed: IndexedDataset
    documents: range
    sampling: Sampling = field(repr=False)

    @functools.cached_property
    def content(self) -> ContentRecord:
        """What tells whether the files are still what they were."""
        return ContentRecord.of(self.indexed.prefix)

    def text(self, apart_from: Sequence[int], length: int, draw: np.random.Generator) -> npt.NDArray[np.int64]:
        """Up to `length` tokens, from anywhere in any sequence but those of the same documents as `apart_from`.

        Raises:
            DataError: there is no other.
        """
        # from the first to the last sequence of a document
        edges, shares = self.indexed.document_indices, set[int]()
        for document in set(np.searchsorted(edges, apart_from, side="right").tolist()):
            shares |= set(range(int(edges[document - 1]), int(edges[document])))
        own = sorted(sequence for sequence in shares if sequence in self.documents)
        if len(own) == len(self.documents):
            raise DataError(
                f"{self.indexed.prefix} has no other document than that of a sample, and bert_sentence_head=nsp takes "
                "the next text from one; give more documents, or use --bert-sentence-head sop"
            )
        chosen = self.documents.start + int(draw.integers(len(self.documents) - len(own)))
        for sequence in own:
            chosen += chosen >= sequence
        size = int(self.indexed.sequence_lengths[chosen])
        offset = int(draw.integers(max(size - length, 0), endpoint=True))
        return self.indexed.gather([(chosen, offset, min(length, size))]).astype(np.int64)

    @property
    def key(self) -> str:
        """What a checkpoint knows this source by: its content and its documents, not its path."""
        return f"{self.indexed.fingerprint()}:{self.documents.start}-{self.documents.stop}"

    def begun(self, requests: Sequence[Request], consumed: int) -> list[Request]:
        """The requests without the last ones of which none of `consumed` samples has been used."""
        kept = list(requests)
        while len(kept) > 1 and sum(map(self.num_samples, kept[:-1])) >= consumed:
            kept.pop()
        return kept

    def lay_out(self, requests: Sequence[Request], needed: int, consumed: int = 0) -> "Layout":
        """Samples 0 .. needed, of which `consumed` are used already, after the layouts that `requests` name.

        Each request is a layout of its own, of whole epochs; when they give fewer samples than are needed, one more
        comes after them. So samples that are laid out stay where they are, whatever is needed in addition.
        """
        if self.sampling.order != "shuffle":
            return Layout([self._stream(needed)], [needed], list(requests))
        kept = list(requests)
        sizes = [self.num_samples(request) for request in kept]
        if not kept or sum(sizes) < needed:
            kept.append(needed - sum(sizes))
            sizes.append(self.num_samples(kept[-1]))
        ends = itertools.accumulate(sizes)
        parts = [
            self._shuffled(request, number) if end > consumed or number == len(kept) - 1 else None
            for number, (request, end) in enumerate(zip(kept, ends, strict=True))
        ]
        return Layout(parts, sizes, kept)

    def num_samples(self, request: Request) -> int:
        """Samples of the layout for one request, without building it."""
        if self.sampling.order != "shuffle":
            return len(self._stream(request))
        sampling = self.sampling
        plan = GPTDataset.plan_for(self.indexed, self.documents, sampling.seq_length, request, sampling.extra_tokens)
        return plan.num_samples

    def _stream(self, num_samples: int | None) -> StreamDataset:
        sampling = self.sampling
        common = (self.indexed, self.documents, sampling.seq_length, num_samples)
        if sampling.order == "consecutive":
            return ConsecutiveDataset(*common, sampling.rows, extra_tokens=sampling.extra_tokens)
        return StreamDataset(*common, sampling.seed, extra_tokens=sampling.extra_tokens)

    def _shuffled(self, request: Request, number: int) -> GPTDataset:
        sampling = self.sampling
        # another one for each further layout: the first one has the run's own, as in Megatron
        seed = sampling.seed if number == 0 else stable_seed_32(sampling.seed, "layout", number)
        return GPTDataset(
            self.indexed, self.documents, sampling.seq_length, request, seed,
            extra_tokens=sampling.extra_tokens, cache=sampling.cache,
        )  # fmt: skip


class Layout:
    """Numbered samples of one source: its layouts one after the other (None: used up, not built any more)."""

    def __init__(self, parts: Sequence[SampleDataset | None], sizes: Sequence[int], requests: list[Request]) -> None:
        self.parts, self.requests = list(parts), requests
        self._ends = list(itertools.accumulate(sizes))

    def __len__(self) -> int:
        """All samples, used ones included."""
        return self._ends[-1]

    def __getitem__(self, number: int) -> Sample:
        """Sample `number`.

        Raises:
            IndexError: no such sample, or one of a layout that is used up.
            DataError: the files changed or cannot be read.
        """
        part = bisect.bisect_right(self._ends, number) if number >= 0 else len(self._ends)
        dataset = self.parts[part] if part < len(self.parts) else None
        if dataset is None:
            raise IndexError(f"sample {number} of {len(self)}, of which the first may be used up")
        return Sample(number, 0, dataset[number - (self._ends[part - 1] if part else 0)].tokens)

    def sequences(self, number: int) -> list[int]:
        """The sequences that sample `number` has tokens of."""
        part = bisect.bisect_right(self._ends, number)
        dataset = self.parts[part]
        assert isinstance(dataset, GPTDataset | StreamDataset), "what a source lays out"
        return dataset.sequences(number - (self._ends[part - 1] if part else 0))


class Padded:
    """A dataset and as many samples without tokens after it as fill a multiple of `size`.

    An evaluation on a whole dataset ends with a full batch then; what is padding has no loss.
    """

    def __init__(self, dataset: SampleDataset, size: int) -> None:
        self._dataset = dataset
        self._num_samples = -(-len(dataset) // size) * size

    def __len__(self) -> int:
        """Number of samples, padding included."""
        return self._num_samples

    def __getitem__(self, number: int) -> Sample:
        """Sample `number`, all -1 beyond the dataset."""
        if number < len(self._dataset):
            return self._dataset[number]
        return Sample(number, 0, np.full_like(self._dataset[0].tokens, PAD))

    def other_text(self, number: int, length: int, draw: np.random.Generator) -> npt.NDArray[np.int64]:
        """As the dataset; padding asks for none."""
        assert isinstance(self._dataset, HasDocuments), "asked before an evaluation begins"
        return self._dataset.other_text(number, length, draw)
