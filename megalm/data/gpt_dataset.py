"""Numbered samples for causal language models: number k -> int64 tokens [seq_length + 1], a pure function."""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megalm.data.indexed import IndexedDataset
from megalm.data.sampling import SampleIndex, build_document_index, build_shuffle_index, plan_epochs
from megalm.errors import DataError

Sample = npt.NDArray[np.int64]

PAD = -1
"""Fills a sample that the data does not fill; never a token id, so no real token is taken for padding."""


class SampleDataset(Protocol):
    """Numbered samples: what a loader reads."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, number: int) -> Sample:
        """The tokens of one sample."""


class GPTDataset:
    """Documents of an indexed dataset, shuffled, laid end to end and cut into samples; equal to Megatron-LM's order.

    `dataset[k]` is int64 [seq_length + 1] (seq_length without `add_extra_token`), padded with -1 at the end of the
    stream. The indices are built in memory (10^7 documents and 10^7 samples: about 1.3 s), so there is no cache
    that could be stale. Picklable; workers reopen the files.

    Args:
        documents: sequence numbers of this split.
        num_samples: samples that the run will draw (more epochs are laid end to end); None is one epoch.
        keep_last_partial: keep a last sample that needs padding.

    Raises:
        DataError: fewer tokens than one sample needs.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        documents: npt.NDArray[np.integer[Any]],
        seq_length: int,
        num_samples: int | None,
        seed: int,
        *,
        add_extra_token: bool = True,
        keep_last_partial: bool = False,
    ) -> None:
        self.indexed = indexed
        self.sample_tokens = seq_length + int(add_extra_token)
        lengths = indexed.sequence_lengths
        tokens_per_epoch = int(lengths[documents].sum(dtype=np.int64))
        if tokens_per_epoch < (1 + int(add_extra_token) if keep_last_partial else self.sample_tokens):
            raise DataError(
                f"{indexed.prefix}: {len(documents)} documents with {tokens_per_epoch} tokens are less than one "
                f"sample of {self.sample_tokens} tokens (seq_length={seq_length}); "
                "give more data, another --split or a smaller --seq-length"
            )
        self.plan = plan_epochs(
            tokens_per_epoch, num_samples, seq_length, int(add_extra_token), keep_last_partial=keep_last_partial
        )
        random = np.random.RandomState(seed)
        self.document_index = build_document_index(documents, self.plan, random)
        self.sample_index = SampleIndex(lengths, self.document_index, self.plan, seq_length, int(add_extra_token))
        self.shuffle_index = build_shuffle_index(self.plan, random)

    def __len__(self) -> int:
        """Samples of all epochs; at least the `num_samples` asked for."""
        return len(self.shuffle_index)

    def __getitem__(self, number: int) -> Sample:
        """The tokens of sample `number`.

        Raises:
            IndexError: no such sample.
            DataError: the files changed or cannot be read.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)} in {self.indexed.prefix}")
        start, stop = self.sample_index.token_range(int(self.shuffle_index[number]))
        starts = self.sample_index.starts
        sample = np.empty(self.sample_tokens, dtype=np.int64)
        position, filled = int(np.searchsorted(starts, start, side="right")) - 1, 0
        while start < stop:
            offset = start - int(starts[position])
            count = min(stop, int(starts[position + 1])) - start
            if count > 0:  # empty documents have no tokens
                sample[filled : filled + count] = self.indexed.get(int(self.document_index[position]), offset, count)
            start, filled, position = start + count, filled + count, position + 1
        sample[filled:] = PAD
        return sample


class MockDataset:
    """Generated samples that a model can learn, for runs without data: a function of (seed, split, number).

    A random walk on a ring of at most 512 token ids (the same for all splits of a seed): each step goes forward by
    one of four fixed strides with probabilities 0.7, 0.15, 0.1 and 0.05. A model that has learned it reaches the
    loss `entropy` (0.91 nats).
    """

    PROBABILITIES = (0.7, 0.15, 0.1, 0.05)

    def __init__(self, vocab_size: int, seq_length: int, seed: int, num_samples: int, *, split: int = 0) -> None:
        self._key = (seed, split)
        self._num_samples = num_samples
        self._sample_tokens = seq_length + 1
        ring = np.random.default_rng([seed, _purpose("mock-ring")])
        self._ids = ring.permutation(vocab_size)[:512].astype(np.int64)
        strides = np.arange(1, max(len(self._ids), len(self.PROBABILITIES) + 1))
        self._strides = ring.choice(strides, size=len(self.PROBABILITIES), replace=False)

    @property
    def entropy(self) -> float:
        """Nats per token after the first, of the walk with four different strides: the lowest reachable loss."""
        return float(-sum(p * np.log(p) for p in self.PROBABILITIES))

    def __len__(self) -> int:
        """Number of samples."""
        return self._num_samples

    def __getitem__(self, number: int) -> Sample:
        """The tokens of sample `number`, int64 [seq_length + 1].

        Raises:
            IndexError: no such sample.
        """
        if not 0 <= number < self._num_samples:
            raise IndexError(f"sample {number} of {self._num_samples} mock samples")
        draw = np.random.default_rng([*self._key, _purpose("mock-walk"), number])
        steps = self._strides[draw.choice(len(self._strides), size=self._sample_tokens, p=self.PROBABILITIES)]
        steps[0] = draw.integers(len(self._ids))
        walk: Sample = self._ids[np.cumsum(steps) % len(self._ids)]
        return walk


def _purpose(name: str) -> int:
    """A purpose as part of a seed: its bytes as one integer, so that different purposes never draw the same."""
    return int.from_bytes(name.encode(), "little")
