"""Dropout with the residual: the share that is dropped, the mask of forward and backward, and of a part's."""

import pytest
import torch
from kernels.fused import DTYPES, TOLERANCE, beside, check, leaf, needs_fused, on_copies, opcheck

from megalm.kernels.dropout import dropout_add, fused_dropout_add


@on_copies(cols=[203, 264], dtype=DTYPES)
def test_dropout_drops_the_share_and_the_gradient_has_the_same_mask(cols, dtype):
    x, residual = leaf(50, cols, dtype=dtype), leaf(50, cols, dtype=dtype)
    torch.manual_seed(7)
    y = fused_dropout_add(x, residual, 0.25)
    torch.manual_seed(7)
    assert torch.equal(y, fused_dropout_add(x, residual, 0.25))
    assert not torch.equal(y, fused_dropout_add(x, residual, 0.25))
    y.sum().backward()
    kept = x.grad != 0
    assert abs(kept.float().mean() - 0.75) < 0.02
    expected = torch.where(kept, x.double() / 0.75, 0.0) + residual.double()
    torch.testing.assert_close(y.double(), expected, rtol=4 * TOLERANCE[dtype], atol=8 * TOLERANCE[dtype])
    assert torch.equal(residual.grad, torch.ones_like(residual))
    check(
        lambda x, r: fused_dropout_add(x, r, 0.0),
        lambda x, r: dropout_add(x, r, 0.0),
        (leaf(3, 7, dtype=dtype), leaf(3, 7, dtype=dtype)),
    )


@on_copies(cols=[21, 24])
def test_parts_of_a_sequence_get_their_part_of_the_mask(cols):
    x, residual = torch.randn(2, 3, 12, cols)
    for residual_or_none in (residual, None):
        torch.manual_seed(7)
        whole = fused_dropout_add(x, residual_or_none, 0.5)
        parts = []
        for number in range(3):
            torch.manual_seed(7)
            own = x.chunk(3, dim=1)[number].detach().requires_grad_()  # not contiguous
            beside = None if residual_or_none is None else residual_or_none.chunk(3, dim=1)[number]
            parts.append(fused_dropout_add(own, beside, 0.5, (number, 3)))
            dropped = parts[-1] if beside is None else parts[-1] - beside
            (gradient,) = torch.autograd.grad(parts[-1].sum(), own)
            assert torch.equal(gradient != 0, (dropped.abs() > 1e-5) | (own.abs() < 1e-4))
        assert torch.equal(torch.cat(parts, dim=1), whole)
    torch.manual_seed(7)
    empty = fused_dropout_add(x[:, :0], None, 0.5, (1, 3))
    assert empty.shape == (3, 0, cols)


@on_copies(dtype=DTYPES)
def test_addresses_that_wide_loads_cannot_read_have_the_same_mask(dtype):
    x, residual = beside(5, 64, dtype=dtype), beside(5, 64, dtype=dtype)
    dropped = []
    for place in (x, x.clone()):
        torch.manual_seed(3)
        dropped.append(fused_dropout_add(place, residual, 0.5))
    assert torch.equal(*dropped)


@needs_fused
@pytest.mark.usefixtures("_device")
def test_operators():
    x, y = (torch.randn(2, 3, 8, requires_grad=True) for _ in range(2))
    opcheck("dropout_add", x, y, torch.tensor([5]), 0.5, 3, 3, 0)
    opcheck("dropout_add", x, None, torch.tensor([5]), 0.5, 3, 6, 3)
