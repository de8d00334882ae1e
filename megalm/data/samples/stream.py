"""Samples of a dataset in file order, drawn in a permuted order: no index, no cache, memory that does not grow.

The documents lie end to end in PREFIX.bin already, so sample p of an epoch is `seq_length` tokens from token
p x seq_length on (and those that it shares with the next), one read of the file. What order would take an index is
taken from a permutation that is computed for each number. Neighbouring documents stay together in a sample: shuffle the
documents when preprocessing.
"""

import numpy as np

from megalm.data.indexed.reader import IndexedDataset
from megalm.data.samples.permutation import KeyedPermutation
from megalm.data.samples.sample import Sample
from megalm.errors import DataError


class StreamDataset:
    """Sequences `documents` of an indexed dataset, cut into samples in file order and permuted anew for each epoch.

    `dataset[k]` has int64 tokens [seq_length + extra_tokens]. Its order depends on the seed and the data only, not on
    how many samples a run draws; there is no last epoch, and `len` is the number asked for. An epoch leaves out the
    last tokens that do not fill a sample.

    Args:
        documents: sequence numbers of this split, neighbours.
        num_samples: samples that the run will draw; None is one epoch.
        extra_tokens: tokens that a sample shares with the next one in the file.

    Raises:
        DataError: fewer tokens than one sample needs.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        documents: range,
        seq_length: int,
        num_samples: int | None,
        seed: int,
        *,
        extra_tokens: int = 1,
    ) -> None:
        self.indexed = indexed
        self.seq_length, self.seed = seq_length, seed
        self.sample_tokens = seq_length + extra_tokens
        self._begin, end = indexed.token_position(documents.start), indexed.token_position(documents.stop)
        self.samples_per_epoch = (end - self._begin - extra_tokens) // seq_length
        if self.samples_per_epoch < 1:
            raise DataError(
                f"{indexed.prefix}: {len(documents)} documents with {end - self._begin} tokens are less than one "
                f"sample of {self.sample_tokens} tokens (seq_length={seq_length}); "
                "give more data, another --split or a smaller --seq-length"
            )
        self._num_samples = self.samples_per_epoch if num_samples is None else num_samples
        self._current = 0, KeyedPermutation(self.samples_per_epoch, "stream", seed, 0)

    def __len__(self) -> int:
        """The number of samples asked for."""
        return self._num_samples

    def sequences(self, number: int) -> list[int]:
        """The sequences that sample `number` has tokens of."""
        position = self._position(number)
        first, last = (self.indexed.sequence_at(place) for place in (position, position + self.sample_tokens - 1))
        return list(range(first, last + 1))

    def __getitem__(self, number: int) -> Sample:
        """Sample `number`.

        Raises:
            IndexError: no such sample.
            DataError: the file changed or cannot be read.
        """
        tokens = self.indexed.tokens(self._position(number), self.sample_tokens)
        return Sample(number, 0, tokens.astype(np.int64))

    def _position(self, number: int) -> int:
        """The first token of a sample in the file.

        Raises:
            IndexError: no such sample.
        """
        if not 0 <= number < self._num_samples:
            raise IndexError(f"sample {number} of {self._num_samples} in {self.indexed.prefix}")
        return self._begin + self._place(number) * self.seq_length

    def _place(self, number: int) -> int:
        """Which of the samples in the file a sample is."""
        epoch, inside = divmod(number, self.samples_per_epoch)
        current, permutation = self._current
        if epoch != current:
            permutation = KeyedPermutation(self.samples_per_epoch, "stream", self.seed, epoch)
            self._current = epoch, permutation
        return permutation[inside]


class ConsecutiveDataset(StreamDataset):
    """The same samples in another order: so many `rows` read the file on, each from a place of its own.

    Sample k is of row k mod rows. Row b begins with the b-th of as many equal stretches of the file and reads on from
    sample to sample, into the next stretch and from the last into the first: an epoch has every sample once, but for
    the last ones (fewer than rows) that do not fill the stretches.

    Raises:
        DataError: fewer samples than rows.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        documents: range,
        seq_length: int,
        num_samples: int | None,
        rows: int,
        *,
        extra_tokens: int = 1,
    ) -> None:
        super().__init__(indexed, documents, seq_length, num_samples, 0, extra_tokens=extra_tokens)
        self._rows, self._stretch = rows, self.samples_per_epoch // rows
        if self._stretch < 1:
            raise DataError(
                f"{indexed.prefix}: {len(documents)} documents have {self.samples_per_epoch} samples of {seq_length} "
                f"tokens, fewer than the {rows} rows of a global batch that are to read them on; give more data, "
                "another --split, or a smaller --seq-length or --global-batch-size (of an evaluation "
                "--eval-global-batch-size)"
            )
        self.samples_per_epoch = rows * self._stretch
        if num_samples is None:
            self._num_samples = self.samples_per_epoch

    def _place(self, number: int) -> int:
        step, row = divmod(number, self._rows)
        return (row * self._stretch + step) % self.samples_per_epoch
