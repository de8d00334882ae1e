"""The gradient of an embedding table."""

import pytest
import torch
from kernels.fused import DTYPES, check, leaf, needs_fused, on_copies, opcheck

from megalm.kernels.embedding import embedding, fused_embedding


@on_copies(sizes=[((0,), 37), ((2, 9), 37), ((1000,), 37), ((70,), 264)], dtype=DTYPES)
def test_embedding_gradient(sizes, dtype):
    tokens, cols = sizes
    table, ids = leaf(11, cols, dtype=dtype), torch.randint(0, 9, tokens)
    check(lambda table: fused_embedding(ids, table), lambda table: embedding(ids, table), (table,))


@needs_fused
@pytest.mark.usefixtures("_device")
def test_operators():
    opcheck("embedding_backward", torch.randn(6, 8), torch.arange(6), torch.arange(6), 9)
