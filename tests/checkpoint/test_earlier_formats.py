"""Checkpoints of earlier formats are read as if they were of this one.

data/format_2 was written by the last version of format 2, after two steps of runs of `FLAGS`, with `value` in place of
every number of weights and moments.
"""

import zlib
from pathlib import Path

import pytest
import torch

from megalm.checkpoint.reader import CheckpointReader

DATA = Path(__file__).parent / "data" / "format_2"
LAYOUTS = ("tp2", "pp2", "tp2_zero1")
KINDS = ("weight", "exp_avg", "exp_avg_sq")


def value(name: str, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    """What stands in the fixtures: every element has its own number."""
    first = zlib.crc32(name.encode()) % 1000 * 1000 + 100 * KINDS.index(kind)
    return torch.arange(first, first + torch.Size(shape).numel(), dtype=torch.float32).view(shape)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_of_format_2_is_read(layout: str) -> None:
    reader = CheckpointReader(DATA / layout)
    assert {name.split(".")[1] for name in reader.names if name.startswith("layers.")} == {"0", "1"}
    assert reader.shape("embedding.tokens.weight") == (9, 4)
    for name in reader.names:
        for kind in KINDS:
            assert torch.equal(reader.read_tensor(name, kind), value(name, kind, reader.shape(name))), (name, kind)
