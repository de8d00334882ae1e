"""Samples of texts that somebody wrote down, to look at."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megalm.data.samples.sample import PAD, Sample
from megalm.errors import DataError


class TextSamples:
    """The same tokens under every number: documents end to end, cut or padded to `length`.

    `eod` stands between two of them; None: nothing.
    """

    def __init__(self, documents: Sequence[Sequence[int]], length: int, eod: int | None) -> None:
        self._documents = documents
        joined: list[int] = []
        for document in documents:
            joined += [*([] if eod is None or not joined else [eod]), *document]
        self._tokens = np.full(length, PAD, dtype=np.int64)
        self._tokens[: len(joined)] = joined[:length]

    def __len__(self) -> int:
        """As many as anybody asks for."""
        return 2**31 - 1

    def __getitem__(self, number: int) -> Sample:
        """The sample, under this number."""
        return Sample(number, 0, self._tokens)

    def other_text(self, number: int, length: int, draw: np.random.Generator) -> npt.NDArray[np.int64]:
        """Tokens of the last document.

        Raises:
            DataError: it is the only one.
        """
        if len(self._documents) < 2:
            raise DataError("a next text needs another document; give one more --text")
        return np.asarray(self._documents[-1][:length], dtype=np.int64)
