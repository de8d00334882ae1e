"""Per-token cross entropy: values, gradients, padding, chunks and memory."""

import pytest
import torch
import torch.nn.functional as F
from kernels.fused import DTYPES, TOLERANCE, check, check_beside, leaf, needs_fused, on_copies, opcheck

from megalm.kernels import cross_entropy as module
from megalm.kernels.cross_entropy import (
    cross_entropy,
    fused_cross_entropy,
    fused_vocabulary_gradient_,
    fused_vocabulary_statistics,
    vocabulary_gradient,
    vocabulary_statistics,
)


@pytest.fixture(params=[1, 40, 10**9], ids=["row by row", "some rows", "one chunk"])
def _chunk_elements(request, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("_chunk_elements")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_and_gradients_match_float64(dtype):
    logits = (3 * torch.randn(3, 5, 13)).to(dtype).requires_grad_()
    labels = torch.randint(0, 11, (3, 5))
    weights = torch.rand(3, 5)
    losses = cross_entropy(logits, labels, num_classes=11)
    (losses * weights).sum().backward()

    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact[..., :11].reshape(-1, 11), labels.flatten(), reduction="none").view(3, 5)
    (expected * weights).sum().backward()
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)
    assert logits.grad.dtype == dtype
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=tolerance, atol=max(1e-7, tolerance * 1e-3))


def test_padded_columns_change_nothing_and_get_no_gradient():
    logits = torch.randn(4, 8)
    labels = torch.tensor([0, 1, 2, 4])
    padded = logits.clone()
    padded[:, 5:] = torch.tensor([1e4, float("nan"), float("inf")])
    padded.requires_grad_()
    losses = cross_entropy(padded, labels, num_classes=5)
    assert torch.equal(losses, cross_entropy(logits[:, :5], labels))
    losses.sum().backward()
    assert torch.equal(padded.grad[:, 5:], torch.zeros(4, 3))


def test_large_logits_stay_finite():
    logits = torch.tensor([[3e4, -3e4], [-3e4, -3e4]]).bfloat16()
    losses = cross_entropy(logits, torch.tensor([0, 1]))
    torch.testing.assert_close(losses, torch.tensor([0.0, 0.6931472]))


def test_label_outside_the_vocabulary_is_an_error():
    with pytest.raises(RuntimeError):
        cross_entropy(torch.randn(2, 8), torch.tensor([0, 5]), num_classes=5)


def test_only_the_logits_and_labels_are_saved_for_backward():
    logits, labels = torch.randn(6, 32).bfloat16().requires_grad_(), torch.arange(6)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        cross_entropy(logits, labels)
    assert sum(t.numel() * t.element_size() for t in saved) == 6 * 32 * 2 + 6 * 8


@pytest.mark.filterwarnings("ignore:Input #0 requires gradient")
def test_gradient_matches_finite_differences_up_to_float32():
    logits = torch.randn(3, 4, requires_grad=True)
    labels = torch.tensor([0, 3, 1])
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels), (logits,), eps=1e-2, atol=1e-3)


@on_copies(sizes=[(5, 13, 11), (3, 5000, 4999), (0, 8, 8), (2, 1, 1)], in_place=[False, True], dtype=DTYPES)
def test_fused_cross_entropy(sizes, in_place, dtype):
    rows, width, classes = sizes
    logits = leaf(rows, width, dtype=dtype, scale=3.0)
    labels = torch.randint(0, classes, (rows,))
    scale = torch.rand(rows)
    scale[:1] = 0.0  # a masked token
    losses = fused_cross_entropy(logits.clone(), labels, classes, in_place=in_place)
    (losses * scale).sum().backward()
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact[:, :classes], labels, reduction="none")
    (expected * scale).sum().backward()
    torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=2e-6)
    tolerance = max(TOLERANCE[dtype], 5e-6)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=tolerance, atol=max(1e-6, tolerance * 1e-3))
    assert torch.equal(logits.grad[:, classes:], torch.zeros(rows, width - classes, dtype=dtype))


@on_copies(dtype=[torch.float32, torch.bfloat16])
def test_rows_wider_than_a_team_of_threads_holds(dtype):
    loose = 20 * TOLERANCE[torch.float32] if dtype == torch.float32 else None
    for columns in (20000, 20003):
        logits, labels = leaf(2, columns, dtype=dtype), torch.tensor([19990, 7])
        check(
            lambda x, labels=labels: fused_cross_entropy(x, labels, 19997),
            lambda x, labels=labels: F.cross_entropy(x[:, :19997], labels, reduction="none"),
            (logits,),
            tolerance=loose,
        )


@on_copies()
def test_cross_entropy_with_infinite_and_padded_logits():
    logits = torch.tensor([[float("-inf"), 1.0, 2.0, float("nan")], [3e4, -3e4, float("-inf"), float("inf")]])
    losses = fused_cross_entropy(logits, torch.tensor([2, 0]), 3)
    torch.testing.assert_close(losses, torch.tensor([0.3132617, 0.0]))
    assert fused_cross_entropy(torch.tensor([[float("nan"), 1.0]]), torch.tensor([1])).isnan()
    labels = torch.tensor([0, 5])
    if labels.is_cuda:  # the host does not wait to look at them
        assert fused_cross_entropy(logits, labels, 3)[1].isnan()
        return
    with pytest.raises(RuntimeError, match=r"label 5 must lie in \[0, 3\)"):
        fused_cross_entropy(logits, labels, 3)


@on_copies()
def test_cross_entropy_in_place_takes_the_memory_of_the_logits_and_refuses_a_second_backward():
    logits = torch.randn(4, 9).requires_grad_()
    copy = logits * 1.0
    copy.retain_grad()
    loss = fused_cross_entropy(copy, torch.arange(4), in_place=True).sum()
    loss.backward(retain_graph=True)
    assert torch.equal(copy.detach(), copy.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@on_copies(dtype=DTYPES)
def test_ranges_of_the_vocabulary_add_up_to_the_whole(dtype):
    logits, labels, scale = (3 * torch.randn(6, 50)).to(dtype), torch.randint(0, 50, (6,)), torch.rand(6)
    whole = fused_cross_entropy(logits, labels)
    parts = [(0, 20), (20, 27), (47, 3)]
    for statistics in (fused_vocabulary_statistics, vocabulary_statistics):
        found = [statistics(logits[:, start : start + size], labels, start, size) for start, size in parts]
        largest = torch.stack([part[0] for part in found]).amax(0)
        total = sum(part[1] * (part[0] - largest).exp() for part in found)
        logsumexp = largest + total.log()
        torch.testing.assert_close(logsumexp - sum(part[2] for part in found), whole, rtol=2e-6, atol=2e-6)
    for start, size in parts:
        part = logits[:, start : start + size].clone()
        expected = vocabulary_gradient(part, labels, logsumexp, scale, start, size - 1)
        result = fused_vocabulary_gradient_(part, labels, logsumexp, scale, start, size - 1)
        torch.testing.assert_close(result, expected, rtol=2 * TOLERANCE[dtype], atol=1e-6)


@on_copies(dtype=DTYPES)
def test_addresses_that_wide_loads_cannot_read(dtype):
    ids = torch.tensor([1, 3, 1, 0, 2])
    check_beside(
        lambda x: fused_cross_entropy(x, ids), lambda x: F.cross_entropy(x.float(), ids, reduction="none"), dtype
    )


@needs_fused
@pytest.mark.usefixtures("_device")
def test_operators():
    logits, labels, scale = torch.randn(6, 8), torch.arange(6), torch.ones(6)
    logsumexp = logits.logsumexp(-1)
    opcheck("cross_entropy", logits, labels, 0, 7, True)
    opcheck("cross_entropy_backward", logits, labels, logsumexp, scale, 0, 7)
    opcheck("cross_entropy_backward_", logits.clone(), labels, logsumexp, scale, 0, 7)
