"""Causal attention: the reference against its formula, our CPU kernel against float64."""

import pytest
import torch
from kernels.fused import needs_fused, opcheck

from megalm.kernels.attention import (
    causal_attention,
    fused_causal_attention,
    own_causal_attention,
    own_kernel_is_faster,
    own_kernel_runs,
)

OURS = pytest.mark.skipif(not own_kernel_runs(), reason="our attention needs AVX-512 with bfloat16")
SHAPES = [  # B, T, H, G, C; blocks are of 64 positions
    (2, 70, 4, 2, 32),
    (1, 1, 3, 3, 16),
    (2, 64, 3, 1, 64),
    (1, 200, 4, 1, 48),
    (1, 129, 2, 2, 128),
    (3, 33, 2, 2, 80),
    (1, 65, 1, 1, 256),
]


def formula(q_BTHC, k_BTGC, v_BTGC):
    """Attention with all scores, in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q_BTHC, k_BTGC, v_BTGC))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(1, 2)


def leaves(shape, dtype, scale=1.0):
    """Queries, keys and values that require a gradient."""
    B, T, H, G, C = shape
    return [(scale * torch.randn(B, T, heads, C)).to(dtype).requires_grad_() for heads in (H, G, G)]


def gradients(function, inputs, weight):
    """Result and gradients of its weighted sum, in float64."""
    y = function(*inputs)
    return [x.double() for x in (y.detach(), *torch.autograd.grad((y * weight).sum(), inputs))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_the_formula(shape):
    inputs = leaves(shape, torch.float64)
    weight = torch.randn(*inputs[0].shape, dtype=torch.float64)
    for found, expected in zip(
        gradients(causal_attention, inputs, weight), gradients(formula, inputs, weight), strict=True
    ):
        torch.testing.assert_close(found, expected)


@OURS
@needs_fused
@pytest.mark.parametrize("scale", [1.0, 8.0], ids=["even", "peaked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_attention(shape, scale):
    inputs = leaves(shape, torch.bfloat16, scale)
    weight = torch.randn(*inputs[0].shape).bfloat16()
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = gradients(formula, exact, weight.double())
    ours, theirs = (gradients(f, inputs, weight) for f in (own_causal_attention, causal_attention))
    for name, one, other, true in zip(("y", "q", "k", "v"), ours, theirs, expected, strict=True):
        size = float(true.norm())
        assert (one - true).norm() <= 1.3 * (other - true).norm() + 1e-4 * (size + 1), f"{name}: as near as torch's"
        assert (one - true).norm() <= 0.02 * size + 1e-2, name


@OURS
@needs_fused
def test_views_of_one_projection_and_a_strided_gradient():
    B, T, C = 2, 70, 32
    joint = torch.randn(B, T, 4 + 2 + 2, C).bfloat16().requires_grad_()
    views = joint.split((4, 2, 2), 2)
    weight = torch.randn(B, 4, T, C).bfloat16().transpose(1, 2)
    (grad,) = torch.autograd.grad(own_causal_attention(*views), joint, weight)
    plain = [x.detach().contiguous().requires_grad_() for x in views]
    expected = torch.autograd.grad(own_causal_attention(*plain), plain, weight.contiguous())
    assert torch.equal(grad, torch.cat(expected, 2))
    turned = [x.detach().transpose(1, 3).contiguous().transpose(1, 3) for x in plain]  # channels are not adjacent
    assert torch.equal(own_causal_attention(*turned), own_causal_attention(*plain))


@OURS
@needs_fused
def test_attention_is_the_same_bits_with_any_number_of_threads():
    inputs = leaves((2, 130, 4, 2, 32), torch.bfloat16)
    weight = torch.randn(*inputs[0].shape).bfloat16()
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(gradients(own_causal_attention, inputs, weight))
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@OURS
@needs_fused
def test_a_position_does_not_see_the_next_ones_and_nan_shows():
    q, k, v = (x.detach() for x in leaves((1, 100, 2, 2, 32), torch.bfloat16))
    before = own_causal_attention(q, k, v)
    k[:, 70], v[:, 70] = 5.0, -5.0
    after = own_causal_attention(q, k, v)
    assert torch.equal(before[:, :70], after[:, :70])
    assert not torch.equal(before[:, 70:], after[:, 70:])
    k[:, 70] = float("nan")
    broken = own_causal_attention(q, k, v)
    assert torch.equal(before[:, :70], broken[:, :70])
    assert broken[:, 70:].isnan().all()
    v[:, 70] = float("nan")  # 0 x NaN: it shows in its block
    assert torch.equal(before[:, :64], own_causal_attention(q, k, v)[:, :64])


@OURS
@needs_fused
def test_scores_of_minus_infinity_in_a_whole_block_leave_the_others_their_numbers():
    q, k, v = (torch.ones(1, 100, 1, 32).bfloat16() for _ in range(3))
    k[:, :64] = float("-inf")
    y = own_causal_attention(q, k, v)
    torch.testing.assert_close(y[:, 64:], v[:, 64:])


@OURS
@needs_fused
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs(wanted):
    inputs = leaves((1, 70, 4, 2, 32), torch.bfloat16)
    y = own_causal_attention(*inputs)
    every = torch.autograd.grad(y.sum(), inputs)
    some = [x if number in wanted else x.detach() for number, x in enumerate(inputs)]
    found = torch.autograd.grad(own_causal_attention(*some).sum(), [some[number] for number in wanted])
    for number, grad in zip(wanted, found, strict=True):
        assert torch.equal(grad, every[number])


@OURS
@needs_fused
def test_empty_batches_and_wrong_shapes():
    for shape in ((0, 5, 2, 16), (2, 0, 2, 16)):
        q = torch.empty(shape, dtype=torch.bfloat16).requires_grad_()
        y = own_causal_attention(q, q, q)
        assert y.shape == q.shape
        assert torch.autograd.grad(y.sum(), q)[0].shape == q.shape
    q, k = torch.zeros(1, 5, 3, 16).bfloat16(), torch.zeros(1, 5, 2, 16).bfloat16()
    with pytest.raises(RuntimeError, match=r"attention needs q \(B, T, H, C\)"):
        torch.ops.megalm.attention(q, k, k, 1.0)
    with pytest.raises(RuntimeError, match="attention is of bfloat16"):
        torch.ops.megalm.attention(q.float(), q.float(), q.float(), 1.0)


@needs_fused
def test_what_our_kernel_does_not_take_goes_to_torch():
    for q in (torch.randn(1, 5, 2, 16), torch.randn(1, 5, 2, 20).bfloat16()):
        assert not own_kernel_is_faster(q, q)
        assert torch.equal(fused_causal_attention(q, q, q), causal_attention(q, q, q))


@OURS
@needs_fused
def test_our_kernel_is_used_where_every_thread_has_a_key_head():
    q, k = torch.randn(1, 5, 8, 16).bfloat16(), torch.randn(1, 5, 1, 16).bfloat16()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert not own_kernel_is_faster(q, k)
        assert own_kernel_is_faster(q, q) == (not torch.cpu.get_capabilities().get("amx_bf16"))
    finally:
        torch.set_num_threads(threads)


@OURS
@needs_fused
def test_operators():
    q, k, v = (torch.randn(2, 3, heads, 16).bfloat16().requires_grad_() for heads in (4, 2, 2))
    opcheck("attention", q, k, v, 0.25)
    plain = [x.detach() for x in (q, q, k, v, q)]
    opcheck("attention_backward", *plain, torch.zeros(2, 4, 3), 0.25)
