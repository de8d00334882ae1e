"""The divergence of a student's next-token distribution from a teacher's, from both logits, with little memory.

Shapes: N tokens, V padded vocabulary (where it is spread over ranks, this rank's columns), C columns that are no
padding.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megalm.kernels.cross_entropy import CHUNK_ELEMENTS


def _own(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Spread:
    """How numbers of tokens come together where each rank has some columns only; the default: all are here."""

    maximum: Callable[[Tensor], Tensor] = _own
    """The largest of the ranks' numbers, element by element."""
    total: Callable[[Tensor], Tensor] = _own
    """Their sum."""
    joined: Callable[[Tensor], Tensor] = _own
    """The ranks' columns side by side."""


def forward_kl(
    student: Tensor,
    teacher: Tensor,
    num_classes: int,
    temperature: float,
    top_k: int | None = None,
    spread: Spread = Spread(),  # a frozen value
) -> Tensor:
    """T^2 x KL(softmax(teacher / T) || softmax(student / T)) of every token, float32, without the dim of columns.

    `student` and `teacher` (..., V) are logits of any float dtype, of which the columns from `num_classes` on are
    vocabulary padding: no probability, gradient exactly zero. With `top_k` both distributions are of the teacher's
    k likeliest tokens alone, and of others whose logit equals the k-th's: what counts does not depend on who has which
    columns. Only the student gets a gradient, T x (softmax(student / T) - softmax(teacher / T)).

    Communicated where columns are spread: five numbers a token, and with `top_k` the k largest of each rank. Saved for
    backward: both logits as they are, and three numbers a token; float32 copies are of a group of rows at a time.
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    apply: Callable[..., Tensor] = _ForwardKL.apply
    V = student.shape[-1]
    kl_N = apply(student.reshape(-1, V), teacher.reshape(-1, V), num_classes, temperature, top_k, spread)
    return kl_N.view(student.shape[:-1])


class _ForwardKL(torch.autograd.Function):
    """Forward: the divergence of each row, with two reductions. Backward: from both logits again, no reduction."""

    @staticmethod
    def forward(
        ctx: Any,
        student_NV: Tensor,
        teacher_NV: Tensor,
        classes: int,
        temperature: float,
        top_k: int | None,
        spread: Spread,
    ) -> Tensor:
        least_N = None if top_k is None else _kth_largest(teacher_NV, classes, top_k, spread)
        logits = _Logits(student_NV, teacher_NV, least_N, classes, temperature)
        largest_N2 = spread.maximum(_over_rows(_largest(s, t) for s, t in logits))
        groups = zip(logits, torch.split(largest_N2, logits.rows), strict=True)
        sums_N3 = spread.total(_over_rows(_sums(s, t, largest) for (s, t), largest in groups))
        normalizers_N2 = largest_N2 + sums_N3[:, :2].log()
        ctx.save_for_backward(student_NV, teacher_NV, least_N, normalizers_N2)
        ctx.options = (classes, temperature)
        # sum of p x (t - s), less what t and s are above log p and log q
        kl_N = sums_N3[:, 2] / sums_N3[:, 1] - normalizers_N2[:, 1] + normalizers_N2[:, 0]
        return kl_N * temperature**2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        student_NV, teacher_NV, least_N, normalizers_N2 = ctx.saved_tensors
        classes, temperature = ctx.options
        logits = _Logits(student_NV, teacher_NV, least_N, classes, temperature)
        grad_NV = torch.zeros_like(student_NV)
        parts = (torch.split(tensor, logits.rows) for tensor in (grad_NV, normalizers_N2, grads[0] * temperature))
        for (student, teacher), grad, normalizers, scale in zip(logits, *parts, strict=True):
            difference = (student - normalizers[:, :1]).exp_() - (teacher - normalizers[:, 1:]).exp_()
            difference *= scale[:, None]
            grad[:, :classes] = difference.masked_fill_(scale[:, None] == 0, 0.0)
        return grad_NV, None, None, None, None, None


@dataclass(frozen=True)
class _Logits:
    """Student's and teacher's logits / T in float32 [n, C], a group of rows at a time; -inf where they do not count."""

    student: Tensor
    teacher: Tensor
    least: Tensor | None
    """The teacher's logit from which on a token counts."""
    classes: int
    temperature: float

    @property
    def rows(self) -> int:
        """Rows of a group."""
        return max(1, CHUNK_ELEMENTS // self.student.shape[-1])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.student), self.rows):
            rows = slice(start, start + self.rows)
            student, teacher = (x[rows, : self.classes].float() for x in (self.student, self.teacher))
            if self.least is not None:
                is_left_out = teacher < self.least[rows, None]
                student, teacher = (x.masked_fill(is_left_out, float("-inf")) for x in (student, teacher))
            yield student / self.temperature, teacher / self.temperature


def _over_rows(groups: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(groups))


def _largest(*logits_nC: Tensor) -> Tensor:
    """The largest of each row of each, [n, 2]; -inf where there are no columns."""
    found = [x.amax(-1) if x.shape[1] else x.new_full((len(x),), float("-inf")) for x in logits_nC]
    return torch.stack(found, dim=-1)


def _sums(student_nC: Tensor, teacher_nC: Tensor, largest_n2: Tensor) -> Tensor:
    """Sums of exp(s - largest), of exp(t - largest) and of exp(t - largest) x (t - s), [n, 3]."""
    likely_nC = (teacher_nC - largest_n2[:, 1:]).exp()
    difference_nC = torch.where(likely_nC > 0, teacher_nC - student_nC, 0.0)  # of what is left out it is no number
    student_n = (student_nC - largest_n2[:, :1]).exp_().sum(-1)
    return torch.stack((student_n, likely_nC.sum(-1), (likely_nC * difference_nC).sum(-1)), dim=-1)


def _kth_largest(teacher_NV: Tensor, classes: int, k: int, spread: Spread) -> Tensor:
    """The k-th largest logit of each row over all columns, float32 [N]; a rank sends its k largest."""
    here = min(k, classes)
    sent = min(k, teacher_NV.shape[-1])  # the same on every rank
    rows = max(1, CHUNK_ELEMENTS // teacher_NV.shape[-1])
    found = []
    for group in torch.split(teacher_NV[:, :classes], rows):
        own = group.new_full((len(group), sent), float("-inf"), dtype=torch.float32)
        own[:, :here] = group.float().topk(here).values if here else own[:, :0]
        found.append(spread.joined(own).topk(k).values[:, -1])
    return torch.cat(found)
