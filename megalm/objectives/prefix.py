"""Prefix language modelling: the first tokens of a text see one another, and every token after them is predicted.

With P tokens of prefix: loss = - sum over t > P of log p(x_t | x_1 .. x_(t-1)).
Sources: Liu et al. 2018, arXiv:1801.10198; Raffel et al. 2020, arXiv:1910.10683, section 3.2.1 and 3.2.3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from megalm.config.sections import RunConfig
from megalm.objectives.base import Example, Field, Sample, Statistics
from megalm.objectives.causal import CausalObjective, document_starts
from megalm.randomness import stable_seed


@dataclass(frozen=True, kw_only=True)
class PrefixObjective:
    """The arrays of `causal`, and `prefix_lengths` (int32 [1]): how many tokens are prefix, 1 .. T - 1, all as likely.

    `loss_mask` is 0 where the label is in the prefix. With `reset_attention_mask` each document of the row has a prefix
    of its own: `prefix_lengths` is int32 [T], in the places of the documents in `cu_seqlens`.
    """

    special_tokens: ClassVar[tuple[str, ...]] = CausalObjective.special_tokens
    shared_tokens: ClassVar[int] = CausalObjective.shared_tokens

    causal: CausalObjective
    seed: int

    @classmethod
    def build(cls, config: RunConfig, special: Mapping[str, int | None]) -> Self:
        """The objective that the run's flags ask for."""
        return cls(causal=CausalObjective.build(config, special), seed=config.training.seed)

    def sample_tokens(self, seq_length: int) -> int:
        """The input, and one token more: the last label."""
        return self.causal.sample_tokens(seq_length)

    def fields(self, seq_length: int) -> Mapping[str, Field]:
        """The fields of every example, in their order."""
        places = seq_length if self.causal.reset_attention_mask else 1
        return {**self.causal.fields(seq_length), "prefix_lengths": Field((places,), np.int32)}

    def __call__(self, sample: Sample) -> Example:
        """The arrays of one batch row."""
        row, T = self.causal(sample), len(sample.tokens) - 1
        starts, places = np.zeros(1, dtype=np.int64), 1
        if self.causal.reset_attention_mask and self.causal.eod is not None:
            starts, places = document_starts(sample.tokens[:-1], self.causal.eod), T
        edges = np.append(starts, T)
        labelled = np.count_nonzero(sample.tokens != self.causal.pad) - 1  # padding is at the end
        lengths = np.diff(np.clip(edges, None, labelled)).clip(0)
        draw = np.random.default_rng(stable_seed(self.seed, "prefix", sample.number))
        prefixes = draw.integers(1, np.maximum(lengths - 1, 1), endpoint=True) * (lengths > 0)
        inside = np.arange(T) - np.repeat(starts, np.diff(edges))
        row["loss_mask"][inside < np.repeat(prefixes, np.diff(edges)) - 1] = 0.0
        row["prefix_lengths"] = np.zeros(places, dtype=np.int32)
        row["prefix_lengths"][: len(prefixes)] = prefixes
        return row

    def statistics(self, batch: Mapping[str, npt.NDArray[Any]]) -> Statistics:
        """Share of the positions that are prefix."""
        return {"prefix_share": (int(batch["prefix_lengths"].sum()), batch["tokens"].size)}
