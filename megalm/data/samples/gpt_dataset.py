"""Numbered samples in Megatron's shuffled order, or generated: number k -> int64 tokens, a pure function."""

from dataclasses import asdict

import numpy as np
import numpy.typing as npt

from megalm.data.indexed.reader import IndexedDataset
from megalm.data.samples.gpt_index import EpochPlan, SampleIndex, build_document_index, build_shuffle_index, plan_epochs
from megalm.data.samples.index_cache import Arrays, CachedArrays, IndexCache
from megalm.data.samples.sample import PAD, Sample
from megalm.errors import DataError
from megalm.randomness import purpose_number
from megalm.storage.whole_file import require_whole


class GPTDataset:
    """Documents of an indexed dataset, shuffled, laid end to end and cut into samples; equal to Megatron-LM's order.

    `dataset[k]` has int64 tokens [seq_length + extra_tokens], padded with -1 at the end of the stream. The indices are
    built in memory, or mapped from `cache`. Picklable; workers reopen the files.

    Args:
        documents: sequence numbers of this split, neighbours.
        extra_tokens: tokens that a sample shares with the next one (1: the last label of a causal model).
        num_samples: samples that the run will draw (more epochs are laid end to end); None is one epoch.
        keep_last_partial: keep a last sample that needs padding.
        cache: where built indices are kept.

    Raises:
        DataError: fewer tokens than one sample needs, or a cache that cannot be written.
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
        keep_last_partial: bool = False,
        cache: IndexCache | None = None,
    ) -> None:
        self.indexed = indexed
        lengths = indexed.sequence_lengths
        self.sample_tokens = seq_length + extra_tokens
        self.plan = plan = self.plan_for(
            indexed, documents, seq_length, num_samples, extra_tokens, keep_last_partial=keep_last_partial
        )

        def build() -> Arrays:
            random = np.random.RandomState(seed)
            document_index = build_document_index(documents, plan, random)
            sample_index = SampleIndex(lengths, document_index, plan, seq_length, extra_tokens)
            return {
                "document_index": document_index,
                "block_starts": sample_index.block_starts,
                "shuffle_index": build_shuffle_index(plan, random),
            }

        if cache is None:
            arrays = CachedArrays(build(), ())
        else:
            key = {"data": indexed.fingerprint(), "documents": [documents.start, documents.stop], **asdict(plan)}
            arrays = cache.get(key | {"seq_length": seq_length, "extra_token": extra_tokens, "seed": seed}, build)
        self._mapped = arrays.files
        self.document_index, self.shuffle_index = arrays["document_index"], arrays["shuffle_index"]
        self.sample_index = SampleIndex(
            lengths, self.document_index, plan, seq_length, extra_tokens, block_starts=arrays["block_starts"]
        )

    @staticmethod
    def plan_for(
        indexed: IndexedDataset,
        documents: range,
        seq_length: int,
        num_samples: int | None,
        extra_tokens: int = 1,
        *,
        keep_last_partial: bool = False,
    ) -> EpochPlan:
        """The epochs and the number of samples that a dataset with these arguments has, without building it.

        Raises:
            DataError: fewer tokens than one sample needs.
        """
        lengths = indexed.sequence_lengths[documents.start : documents.stop]
        tokens_per_epoch = int(lengths.sum(dtype=np.int64))
        if tokens_per_epoch < (1 + extra_tokens if keep_last_partial else seq_length + extra_tokens):
            raise DataError(
                f"{indexed.prefix}: {len(documents)} documents with {tokens_per_epoch} tokens are less than one "
                f"sample of {seq_length + extra_tokens} tokens (seq_length={seq_length}); "
                "give more data, another --split or a smaller --seq-length"
            )
        return plan_epochs(tokens_per_epoch, num_samples, seq_length, extra_tokens, keep_last_partial=keep_last_partial)

    def __len__(self) -> int:
        """Samples of all epochs; at least the `num_samples` asked for."""
        return len(self.shuffle_index)

    def __getitem__(self, number: int) -> Sample:
        """Sample `number`.

        Raises:
            IndexError: no such sample.
            DataError: the files changed or cannot be read.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)} in {self.indexed.prefix}")
        tokens = self.indexed.gather(self._pieces(number))
        if len(tokens) == self.sample_tokens:
            return Sample(number, 0, tokens.astype(np.int64))
        padded = np.full(self.sample_tokens, PAD, dtype=np.int64)
        padded[: len(tokens)] = tokens
        return Sample(number, 0, padded)

    def sequences(self, number: int) -> list[int]:
        """The sequences that sample `number` has tokens of."""
        return [sequence for sequence, _, _ in self._pieces(number)]

    def _pieces(self, number: int) -> list[tuple[int, int, int]]:
        """The parts of sample `number`.

        Raises:
            DataError: what is mapped was cut.
        """
        self.indexed.require_index()
        require_whole(self._mapped)
        return self.sample_index.pieces(int(self.shuffle_index[number]))


class MockDataset:
    """Generated samples that a model can learn, for runs without data: a function of (seed, split, number).

    A random walk on a ring of at most 512 token ids (the same for all splits of a seed): each step goes forward by
    one of four fixed strides with probabilities 0.7, 0.15, 0.1 and 0.05. A model that has learned it reaches the
    loss `entropy` (0.91 nats).
    """

    PROBABILITIES = (0.7, 0.15, 0.1, 0.05)

    def __init__(
        self, vocab_size: int, seq_length: int, seed: int, num_samples: int, *, split: int = 0, extra_tokens: int = 1
    ) -> None:
        self._key = (seed, split)
        self._num_samples = num_samples
        self._sample_tokens = seq_length + extra_tokens
        ring = np.random.default_rng([seed, purpose_number("mock-ring")])
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
        """Sample `number`, with int64 tokens [seq_length + extra_tokens].

        Raises:
            IndexError: no such sample.
        """
        if not 0 <= number < self._num_samples:
            raise IndexError(f"sample {number} of {self._num_samples} mock samples")
        draw = np.random.default_rng([*self._key, purpose_number("mock-walk"), number])
        return Sample(number, 0, self.other_text(number, self._sample_tokens, draw))

    def other_text(self, number: int, length: int, draw: np.random.Generator) -> npt.NDArray[np.int64]:
        """A walk of `length` tokens."""
        steps = self._strides[draw.choice(len(self._strides), size=length, p=self.PROBABILITIES)]
        steps[0] = draw.integers(len(self._ids))
        walk: npt.NDArray[np.int64] = self._ids[np.cumsum(steps) % len(self._ids)]
        return walk
