"""Replaced-token detection (ELECTRA): a generator fills in hidden tokens, and a discriminator tells which are its own.

Shapes: T sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from megalm.objectives.base import Example, Field, Sample, filled
from megalm.objectives.masked import MaskedObjective
from megalm.randomness import stable_seed


@dataclass(frozen=True, kw_only=True, eq=False)
class ReplacedObjective(MaskedObjective):
    """What the generator reads: a text all of whose hidden tokens are the mask; the rest happens in the model.

    The fields are those of `MaskedObjective`, and `hidden_places` (int64 [T]), where tokens are hidden, then T;
    `padding_mask` (bool [T]), False behind the text; `draw_seed` (int64 []), from which the model draws what stands in
    the place of the hidden tokens.
    Source: Clark et al. 2020, arXiv:2003.10555, section 2. (Its published code leaves 15 % of the hidden tokens as they
    are.)
    """

    name: ClassVar[str] = "rtd"
    masked_share: ClassVar[float] = 1.0
    replaced_share: ClassVar[float] = 0.0

    def fields(self, seq_length: int) -> Mapping[str, Field]:
        """The fields of every example, in their order."""
        return {
            **super().fields(seq_length),
            "hidden_places": Field((seq_length,), np.int64),
            "padding_mask": Field((seq_length,), np.bool_),
            "draw_seed": Field((), np.int64),
        }

    def __call__(self, sample: Sample) -> Example:
        """The arrays of one batch row."""
        row = super().__call__(sample)
        T, text = len(row["tokens"]), int(np.count_nonzero(sample.tokens >= 0))
        row["hidden_places"] = filled(np.flatnonzero(row["loss_mask"]), T, T)
        row["padding_mask"] = np.arange(T) < (text + self._around if text else 0)
        row["draw_seed"] = np.asarray(stable_seed(self.seed, "replaced tokens", sample.number), dtype=np.int64)
        return row
