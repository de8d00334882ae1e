"""Per-token cross entropy: values, gradients, padding, chunks and memory."""

import pytest
import torch
import torch.nn.functional as F

from megalm.kernels import cross_entropy as module
from megalm.kernels.cross_entropy import cross_entropy


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
