"""The forward divergence from a teacher against torch's own of whole distributions."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.kernels import divergence
from megalm.kernels.divergence import forward_kl

N, V, CLASSES = 7, 24, 21


def logits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A student's and a teacher's, whose columns of padding are not to count."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (4 * torch.randn(N, V, generator=generator) for _ in range(2))
    for x in (student, teacher):
        x[:, CLASSES:] = 1e4
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def by_torch(student: Tensor, teacher: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """T^2 KL(p || q), of the teacher's likeliest tokens alone."""
    student, teacher = (x[:, :CLASSES].double() / temperature for x in (student, teacher))
    if top_k is not None:
        kept = teacher.topk(top_k).indices
        student, teacher = student.gather(1, kept), teacher.gather(1, kept)
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    return temperature**2 * F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("top_k", [None, 1, 5, CLASSES])
@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.3])
def test_value_and_gradient_are_those_of_the_formula(
    temperature: float, top_k: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", 2 * V)  # groups of two rows
    student, teacher = logits(dtype)
    if dtype == torch.bfloat16 and top_k == 5:  # equal logits at the border would count here, and torch chooses
        teacher += torch.arange(V, dtype=dtype) * 8
    scale = torch.rand(N, generator=torch.Generator().manual_seed(1))
    scale[2] = 0
    found = forward_kl(student.view(1, N, V), teacher.view(1, N, V), CLASSES, temperature, top_k)
    assert found.shape == (1, N)
    assert found.dtype == torch.float32
    (gradient,) = torch.autograd.grad(found, student, scale.view(1, N))
    expected = by_torch(student, teacher, temperature, top_k)
    (expected_gradient,) = torch.autograd.grad(expected, student, scale.double())
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-4)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(gradient, expected_gradient, **tolerance)
    assert not gradient[:, CLASSES:].any()
    assert not gradient[2].any()


def test_it_is_zero_for_the_teacher_itself_and_for_one_token() -> None:
    student, teacher = logits()
    for found in (forward_kl(teacher, teacher, CLASSES, 2.0), forward_kl(student, teacher, CLASSES, 2.0, 1)):
        torch.testing.assert_close(found, torch.zeros(N), rtol=0, atol=1e-5)


def test_a_token_that_equals_the_last_of_the_likeliest_counts_too() -> None:
    teacher = torch.tensor([[3.0, 2.0, 2.0, 1.0]])
    student = torch.tensor([[0.0, 1.0, 2.0, 9.0]])
    expected = by_torch(student[:, :3], teacher[:, :3], 1.0, None)
    torch.testing.assert_close(forward_kl(student, teacher, 4, 1.0, 2).double(), expected)


def test_a_masked_token_may_have_no_number() -> None:
    student, teacher = logits()
    teacher[3] = float("nan")
    found = forward_kl(student, teacher, CLASSES, 1.0)
    (gradient,) = torch.autograd.grad(torch.where(torch.arange(N) == 3, 0.0, found).sum(), student)
    assert gradient.isfinite().all()
