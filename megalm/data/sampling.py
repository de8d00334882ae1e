"""Which tokens make up sample number k: pure integer functions, equal to megatron-core's arrays for equal settings.

The documents of a split are repeated for as many epochs as needed, shuffled, laid end to end and cut into samples
of `seq_length` tokens, which share one token with their neighbour when an extra token is drawn (`extra_token` 1: the
last label). The samples are shuffled again. "Rule n" below are the steps of Megatron's GPTDataset; one legacy
`RandomState(seed)` is used for all of it, first for the documents and then for the samples.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

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
    extra_token: int = 1,
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
    wanted = 0 if num_samples is None else num_samples * seq_length + extra_token
    num_epochs = max(1, -(-wanted // tokens_per_epoch))
    total = num_epochs * tokens_per_epoch - extra_token
    separate, before_last = False, 0
    if num_epochs > 1:
        assert num_samples is not None, "more than one epoch only for a requested number"
        before_last = ((num_epochs - 1) * tokens_per_epoch - extra_token) // seq_length
        per_epoch = (tokens_per_epoch - extra_token) // seq_length
        # int of a float64 product, as Megatron computes it, so that the decision is the same for every size
        separate = num_samples - before_last < int(0.80 * per_epoch)
    return EpochPlan(
        num_epochs=num_epochs,
        separate_last_epoch=separate,
        num_samples_before_last=before_last,
        num_samples=-(-total // seq_length) if keep_last_partial else total // seq_length,
    )


def build_document_index(
    documents: npt.NDArray[np.integer[Any]], plan: EpochPlan, random: np.random.RandomState
) -> npt.NDArray[np.int32]:
    """The documents of all epochs in shuffled order, int32 [num_epochs x num_documents] (rule 5)."""
    epochs = [plan.num_epochs - 1, 1] if plan.separate_last_epoch else [plan.num_epochs]
    parts = []
    for count in epochs:
        part = np.tile(documents.astype(np.int32), count)
        random.shuffle(part)
        parts.append(part)
    return np.concatenate(parts)


def build_shuffle_index(plan: EpochPlan, random: np.random.RandomState) -> npt.NDArray[np.integer[Any]]:
    """Sample number -> position in the stream, uint32 or int64 [num_samples] (rule 7)."""
    num_samples = plan.num_samples
    dtype = np.int64 if num_samples >= 2**32 - 2 else np.uint32
    edges = [0, plan.num_samples_before_last, num_samples] if plan.separate_last_epoch else [0, num_samples]
    parts = []
    for start, stop in itertools.pairwise(edges):
        part = np.arange(start, stop, dtype=dtype)
        random.shuffle(part)
        parts.append(part)
    return np.concatenate(parts)


class SampleIndex:
    """Where each sample starts in the stream of documents, computed when asked: nothing per sample is stored.

    Row k is (position in the document index, offset in that document) of stream token k x seq_length.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.integer[Any]],
        document_index: npt.NDArray[np.integer[Any]],
        plan: EpochPlan,
        seq_length: int,
        extra_token: int = 1,
    ) -> None:
        self.seq_length, self.extra_token = seq_length, extra_token
        self.num_samples = plan.num_samples
        self.starts: Int64s = np.zeros(len(document_index) + 1, dtype=np.int64)
        """Stream position of the first token of each document, then the length of the stream."""
        np.cumsum(lengths[document_index], dtype=np.int64, out=self.starts[1:])
        self._longest = int(lengths.max(initial=0))

    @property
    def num_tokens(self) -> int:
        """Length of the stream."""
        return int(self.starts[-1])

    def token_range(self, position: int) -> tuple[int, int]:
        """Half-open range of stream tokens of sample `position`; shorter at the end of the stream."""
        start = position * self.seq_length
        return start, min(start + self.seq_length + self.extra_token, self.num_tokens)

    def rows(self, start: int = 0, stop: int | None = None) -> Int64s:
        """Rows start .. stop of Megatron's sample index, int64 [stop - start, 2]; default: all num_samples + 1.

        Ties follow Megatron: with an extra token a row names the document that contains its token, so empty
        documents are passed over; without one it names the document in which the token before it lies.
        """
        numbers = np.arange(start, self.num_samples + 1 if stop is None else stop, dtype=np.int64)
        wanted = numbers * self.seq_length
        end = self.num_tokens - self.extra_token
        side: Literal["left", "right"] = "right" if self.extra_token else "left"
        position = np.searchsorted(self.starts, np.minimum(wanted, end), side=side).astype(np.int64) - 1
        offset = np.minimum(wanted, end) - self.starts[np.maximum(position, 0)]
        # a partial last sample ends in the last document, even when that one is empty
        beyond = wanted > end
        position[beyond] = len(self.starts) - 2
        offset[beyond] = self.starts[-1] - self.starts[-2] - self.extra_token
        first = numbers == 0
        position[first] = offset[first] = 0
        return np.stack([position, offset], axis=1)

    def as_megatron(self) -> npt.NDArray[np.integer[Any]]:
        """The whole index with Megatron's dtype: int32, or int64 when a row could exceed it."""
        large = max(len(self.starts) - 1, self._longest) > 2**31 - 1
        return self.rows().astype(np.int64 if large else np.int32)
