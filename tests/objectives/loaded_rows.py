"""What loaders hand out, compared with an objective's own rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megalm.data.loader import build_loader


def numbers_of_equal_rows(
    data: Any, chosen: Any, expected: Sequence[Any], length: int, *, workers: int, size: int, start: int
) -> list[int]:
    """The numbers of all samples that loaders of `size` ranks give from `start` on; each row is the expected one."""
    seen = []
    for rank in range(size):
        with build_loader(
            data, chosen, micro_batch_size=2, global_batch_size=2 * size, start_sample=start, stop_sample=len(expected),
            rank=rank, size=size, num_workers=workers, fields=chosen.fields(length),
        ) as batches:  # fmt: skip
            for batch in batches:
                for place, number in enumerate(batch.numbers):
                    row = expected[number]
                    assert row.keys() == batch.tensors.keys()
                    assert all(np.array_equal(batch[name][place].numpy(), row[name]) for name in row)
                    seen.append(number)
    return seen
