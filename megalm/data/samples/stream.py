"""Samples of a dataset in file order, drawn in a permuted order: no index, no cache, memory that does not grow.

The documents lie end to end in PREFIX.bin already, so sample p of an epoch is `seq_length` tokens from token
p x seq_length on (and one more), one read of the file. What order would take an index is taken from a permutation that
is computed for each number. Neighbouring documents stay together in a sample: shuffle the documents when preprocessing.
"""

import numpy as np

from megalm.data.indexed.reader import IndexedDataset
from megalm.data.samples.gpt_dataset import Sample
from megalm.data.samples.permutation import KeyedPermutation
from megalm.errors import DataError


class StreamDataset:
    """Sequences `documents` of an indexed dataset, cut into samples in file order and permuted anew for each epoch.

    `dataset[k]` is int64 [seq_length + 1]. Its order depends on the seed and the data only, not on how many samples a
    run draws; there is no last epoch, and `len` is the number asked for. An epoch leaves out the last tokens that do
    not fill a sample.

    Args:
        documents: sequence numbers of this split, neighbours.
        num_samples: samples that the run will draw; None is one epoch.

    Raises:
        DataError: fewer tokens than one sample needs.
    """

    def __init__(
        self, indexed: IndexedDataset, documents: range, seq_length: int, num_samples: int | None, seed: int
    ) -> None:
        self.indexed = indexed
        self.seq_length, self.seed = seq_length, seed
        self._begin, end = indexed.token_position(documents.start), indexed.token_position(documents.stop)
        self.samples_per_epoch = (end - self._begin - 1) // seq_length
        if self.samples_per_epoch < 1:
            raise DataError(
                f"{indexed.prefix}: {len(documents)} documents with {end - self._begin} tokens are less than one "
                f"sample of {seq_length + 1} tokens (seq_length={seq_length}); "
                "give more data, another --split or a smaller --seq-length"
            )
        self._num_samples = self.samples_per_epoch if num_samples is None else num_samples
        self._current = 0, KeyedPermutation(self.samples_per_epoch, "stream", seed, 0)

    def __len__(self) -> int:
        """The number of samples asked for."""
        return self._num_samples

    def __getitem__(self, number: int) -> Sample:
        """The tokens of sample `number`.

        Raises:
            IndexError: no such sample.
            DataError: the file changed or cannot be read.
        """
        if not 0 <= number < self._num_samples:
            raise IndexError(f"sample {number} of {self._num_samples} in {self.indexed.prefix}")
        epoch, inside = divmod(number, self.samples_per_epoch)
        current, permutation = self._current
        if epoch != current:
            permutation = KeyedPermutation(self.samples_per_epoch, "stream", self.seed, epoch)
            self._current = epoch, permutation
        position = self._begin + permutation[inside] * self.seq_length
        return self.indexed.tokens(position, self.seq_length + 1).astype(np.int64)
