"""Which tokens make up sample number k: pure integer functions, equal to megatron-core's arrays for equal settings.

The documents of a split are repeated for as many epochs as needed, shuffled, laid end to end and cut into samples
of `seq_length` tokens, which share one token with their neighbour when an extra token is drawn (`extra_tokens` 1: the
last label). The samples are shuffled again. "Rule n" below are the steps of Megatron's GPTDataset; one legacy
`RandomState(seed)` is used for all of it, first for the documents and then for the samples.
"""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megalm.kernels.shuffle import shuffle

Int64s = npt.NDArray[np.int64]


def split_bounds(shares: Sequence[float], num_elements: int) -> list[tuple[int, int]]:
    """Half-open ranges of `num_elements` consecutive elements, one per share (shares sum to 1).

    Cumulated and rounded as Megatron does: Python's float sum from the integer 0, then round half to even.
    """
    edges: list[float] = [0]
    for share in shares:
        edges.append(edges[-1] + share)
    return list(itertools.pairwise(round(edge * num_elements) for edge in edges))


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """How many epochs are laid end to end and which samples they give."""

    num_epochs: int
    separate_last_epoch: bool
    """The last epoch is shuffled by itself, because only a small part of it is needed."""
    num_samples_before_last: int
    """Samples that lie in the epochs before the last one."""
    num_samples: int
    """All samples of all epochs; at least as many as were asked for."""


def plan_epochs(
    tokens_per_epoch: int,
    num_samples: int | None,
    seq_length: int,
    extra_tokens: int = 1,
    *,
    keep_last_partial: bool = False,
) -> EpochPlan:
    """The epochs for `num_samples` samples (None: one epoch).

    The last epoch is separate when less than 80 % of its samples are needed. `keep_last_partial` counts a last
    sample that is shorter than seq_length, with integers: Megatron's C++ takes a float32 ceil there, which is off by
    one sample beyond 2^24 tokens.

    Raises:
        ValueError: one epoch has no tokens.
    """
    if tokens_per_epoch <= 0:
        raise ValueError("an epoch needs at least one token")
    wanted = 0 if num_samples is None else num_samples * seq_length + extra_tokens
    num_epochs = max(1, -(-wanted // tokens_per_epoch))
    total = num_epochs * tokens_per_epoch - extra_tokens
    separate, before_last = False, 0
    if num_epochs > 1:
        assert num_samples is not None, "more than one epoch only for a requested number"
        before_last = ((num_epochs - 1) * tokens_per_epoch - extra_tokens) // seq_length
        per_epoch = (tokens_per_epoch - extra_tokens) // seq_length
        # int of a float64 product, as Megatron computes it, so that the decision is the same for every size
        separate = num_samples - before_last < int(0.80 * per_epoch)
    return EpochPlan(
        num_epochs=num_epochs,
        separate_last_epoch=separate,
        num_samples_before_last=before_last,
        num_samples=-(-total // seq_length) if keep_last_partial else total // seq_length,
    )


def build_document_index(documents: range, plan: EpochPlan, random: np.random.RandomState) -> npt.NDArray[np.int32]:
    """The documents of all epochs in shuffled order, int32 [num_epochs x num_documents] (rule 5)."""
    index = np.empty((plan.num_epochs, len(documents)), dtype=np.int32)
    index[:] = np.arange(documents.start, documents.stop, dtype=np.int32)
    flat: npt.NDArray[np.int32] = index.reshape(-1)
    last = len(flat) - len(documents) if plan.separate_last_epoch else len(flat)
    _shuffle_parts(flat, last, random)
    return flat


def build_shuffle_index(plan: EpochPlan, random: np.random.RandomState) -> npt.NDArray[np.integer[Any]]:
    """Sample number -> position in the stream, uint32 or int64 [num_samples] (rule 7)."""
    index: npt.NDArray[np.integer[Any]] = np.arange(plan.num_samples, dtype=shuffle_dtype(plan.num_samples))
    _shuffle_parts(index, plan.num_samples_before_last if plan.separate_last_epoch else len(index), random)
    return index


def shuffle_dtype(num_samples: int) -> type[np.uint32] | type[np.int64]:
    """Megatron's type of the shuffle index."""
    return np.int64 if num_samples >= 2**32 - 2 else np.uint32


def _shuffle_parts(array: npt.NDArray[Any], edge: int, random: np.random.RandomState) -> None:
    """Shuffles the elements before `edge`, then those from it on, in place: no second copy is ever held."""
    shuffle(random, array[:edge])
    if edge < len(array):
        shuffle(random, array[edge:])


class SampleIndex:
    """Where each sample starts in the stream of documents, computed when asked: nothing per sample is stored.

    Row k is (position in the document index, offset in that document) of stream token k x seq_length. Only the stream
    position of every 32nd document is kept (`block_starts`); what lies between is summed when it is needed.

    Args:
        block_starts: those positions, if they are known already.
    """

    BLOCK = 32

    def __init__(
        self,
        lengths: npt.NDArray[np.integer[Any]],
        document_index: npt.NDArray[np.integer[Any]],
        plan: EpochPlan,
        seq_length: int,
        extra_tokens: int = 1,
        block_starts: Int64s | None = None,
    ) -> None:
        self.seq_length, self.extra_tokens = seq_length, extra_tokens
        self.num_samples = plan.num_samples
        self._lengths, self._document_index = lengths, document_index
        self.block_starts = _block_starts(lengths, document_index, self.BLOCK) if block_starts is None else block_starts
        """Stream position of the first token of each block of documents, then the length of the stream."""
        self.num_tokens = int(self.block_starts[-1])
        """Length of the stream."""

    def token_range(self, position: int) -> tuple[int, int]:
        """Half-open range of stream tokens of sample `position`; shorter at the end of the stream."""
        start = position * self.seq_length
        return start, min(start + self.seq_length + self.extra_tokens, self.num_tokens)

    def pieces(self, position: int) -> list[tuple[int, int, int]]:
        """(document, offset, number of tokens) of each part of sample `position`, in order; none is empty."""
        start, stop = self.token_range(position)
        parts = []
        # side right: blocks of empty documents are passed over
        block = int(self.block_starts.searchsorted(start, side="right")) - 1
        while start < stop:
            documents = self._document_index[block * self.BLOCK : (block + 1) * self.BLOCK]
            # lists: numpy's calls take longer than the work on 32 numbers
            lengths = self._lengths[documents].tolist()
            edges = list(itertools.accumulate(lengths, initial=int(self.block_starts[block])))
            first, last = bisect.bisect_right(edges, start) - 1, bisect.bisect_left(edges, stop)
            bounds = itertools.pairwise(edges[first : last + 1])
            for document, (begin, end) in zip(documents[first:last].tolist(), bounds, strict=True):
                taken = min(stop, end) - start
                if taken > 0:
                    parts.append((document, start - begin, taken))
                    start += taken
            block += 1
        return parts

    def rows(self, start: int = 0, stop: int | None = None) -> Int64s:
        """Rows start .. stop of Megatron's sample index, int64 [stop - start, 2]; default: all num_samples + 1.

        Ties follow Megatron: with an extra token a row names the document that contains its token, so empty
        documents are passed over; without one it names the document in which the token before it lies.
        """
        starts: Int64s = np.zeros(len(self._document_index) + 1, dtype=np.int64)
        np.cumsum(self._lengths[self._document_index], dtype=np.int64, out=starts[1:])
        numbers = np.arange(start, self.num_samples + 1 if stop is None else stop, dtype=np.int64)
        wanted = numbers * self.seq_length
        end = self.num_tokens - self.extra_tokens
        side: Literal["left", "right"] = "right" if self.extra_tokens else "left"
        position = np.searchsorted(starts, np.minimum(wanted, end), side=side).astype(np.int64) - 1
        offset = np.minimum(wanted, end) - starts[np.maximum(position, 0)]
        # a partial last sample ends in the last document, even when that one is empty
        beyond = wanted > end
        position[beyond] = len(starts) - 2
        offset[beyond] = starts[-1] - starts[-2] - self.extra_tokens
        first = numbers == 0
        position[first] = offset[first] = 0
        return np.stack([position, offset], axis=1)

    def as_megatron(self) -> npt.NDArray[np.integer[Any]]:
        """The whole index with Megatron's dtype: int32, or int64 when a row could exceed it."""
        return self.rows().astype(row_dtype(len(self._document_index), int(self._lengths.max(initial=0))))


def row_dtype(num_positions: int, longest: int) -> type[np.int32] | type[np.int64]:
    """Megatron's type of the sample index, for so many entries of the document index and tokens of a document."""
    return np.int64 if max(num_positions, longest) > 2**31 - 1 else np.int32


def _block_starts(
    lengths: npt.NDArray[np.integer[Any]], document_index: npt.NDArray[np.integer[Any]], block: int
) -> Int64s:
    starts: Int64s = np.zeros(-(-len(document_index) // block) + 1, dtype=np.int64)
    # The lengths of this split, copied: in the .idx they are not aligned, which makes each random access slower; and
    # with half the bytes fewer of them miss the cache.
    low, high = int(document_index.min()), int(document_index.max())
    own = lengths[low : high + 1]
    own = own.astype(np.uint16 if int(own.max()) < 2**16 else own.dtype)
    chunk = block << 15  # a million documents at a time: the lengths in stream order are never held at once
    for first in range(0, len(document_index), chunk):
        ordered = own.take(document_index[first : first + chunk] - low, mode="clip")  # twice as fast as [...]
        whole = len(ordered) // block
        sums = ordered[: whole * block].reshape(whole, block).sum(axis=1, dtype=np.int64)  # faster than reduceat
        starts[first // block + 1 : first // block + 1 + whole] = sums
        if whole * block < len(ordered):  # the last block, which is not full
            starts[-1] = ordered[whole * block :].sum(dtype=np.int64)
    np.cumsum(starts, out=starts)
    return starts
