"""The loss over a vocabulary that is spread, from logits and without holding them, against autograd's on all of it."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.kernels import linear_cross_entropy
from megalm.models.blocks.head import TokenLoss, use_linear_loss
from megalm.parallel.region import SEQUENCE, InputHook, TensorParallel
from megalm.parallel.vocab import VocabParallelHead, VocabParallelTiedHead, VocabParallelTokenLoss
from megalm.testing.spawner import run_on_ranks

RANKS, B, T, D, ROWS = 3, 2, 6, 5, 24
VOCAB = 13  # eight ids on the first rank, five and padding on the second, padding alone on the third
Found = tuple[Tensor, Tensor, Tensor, int]
"""Losses, this rank's gradients of hidden states and weight, and the bytes that the forward pass kept."""


def whole() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, labels and the gradient of the losses, some of them masked."""
    generator = torch.Generator().manual_seed(1)
    x_BTD, weight_VD = (torch.randn(shape, generator=generator) for shape in ((B, T, D), (ROWS, D)))
    labels_BT = torch.randint(VOCAB, (B, T), generator=generator)
    grad_BT = torch.rand(B, T, generator=generator)
    grad_BT[0, 2:4] = 0
    return x_BTD, weight_VD, labels_BT, grad_BT


def losses_of_rank(sequence_parallel: bool, tied: bool, linear: bool, split: bool) -> Found:
    group, rank = dist.group.WORLD, dist.get_rank()
    tp = TensorParallel(group, rank, RANKS, 1, group, sequence_parallel)
    x_BTD, weight_VD, labels_BT, grad_BT = whole()
    own_BTD = x_BTD.chunk(RANKS, SEQUENCE)[rank] if sequence_parallel else x_BTD
    own_BTD = own_BTD.clone().requires_grad_()
    owner = nn.Embedding(ROWS // RANKS, D) if tied else VocabParallelHead(D, ROWS // RANKS)
    owner.weight.data.copy_(weight_VD.chunk(RANKS)[rank])
    head = VocabParallelTiedHead() if tied else owner
    head.register_forward_pre_hook(InputHook(tp))
    loss = VocabParallelTokenLoss(tp, VOCAB)
    if linear:
        use_linear_loss(loss)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    given = {"embedding": owner} if tied else {}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses_BT = loss(own_BTD * 1, labels_BT, lambda x, **use: head(x, **given, **use))
    if split:  # as zero-bubble schedules: towards the input, then towards the weights
        (grad_x_BTD,) = torch.autograd.grad(losses_BT, own_BTD, grad_BT, retain_graph=True)
        (grad_weight_VD,) = torch.autograd.grad(losses_BT, owner.weight, grad_BT)
    else:
        losses_BT.backward(grad_BT)
        grad_x_BTD, grad_weight_VD = own_BTD.grad, owner.weight.grad
    return losses_BT.detach(), grad_x_BTD, grad_weight_VD, sum(kept.values())


CASES = [
    (sequence_parallel, tied, linear, split)
    for sequence_parallel in (False, True)
    for tied, linear, split in ((False, False, False), (False, True, False), (True, True, True))
]


def losses_of_cases() -> list[Found]:
    linear_cross_entropy.CHUNK_LOGITS, linear_cross_entropy.LEAST_COLUMNS = 1, 3  # several chunks a rank
    return [losses_of_rank(*case) for case in CASES]


@pytest.fixture(scope="module")
def found() -> list[list[Found]]:
    return run_on_ranks(RANKS, losses_of_cases)


@pytest.mark.parametrize("number", range(len(CASES)), ids=map(str, CASES))
def test_losses_and_gradients_are_those_of_all_logits(found: list[list[Found]], number: int) -> None:
    x_BTD, weight_VD, labels_BT, grad_BT = whole()
    x_BTD, weight_VD = x_BTD.requires_grad_(), weight_VD.requires_grad_()
    logits_BTV = x_BTD @ weight_VD[:VOCAB].t()
    expected_BT = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), reduction="none").view(B, T)
    expected_BT.backward(grad_BT)
    sequence_parallel = CASES[number][0]
    for rank, (losses_BT, grad_x_BTD, grad_weight_VD, _) in enumerate(ranks[number] for ranks in found):
        torch.testing.assert_close(losses_BT, expected_BT.detach())
        own = x_BTD.grad.chunk(RANKS, SEQUENCE)[rank] if sequence_parallel else x_BTD.grad
        torch.testing.assert_close(grad_x_BTD, own)
        torch.testing.assert_close(grad_weight_VD, weight_VD.grad.chunk(RANKS)[rank])


TOP_K = (None, 1, 4, 11, VOCAB)


def compared() -> tuple[Tensor, Tensor]:
    """A student's logits and a teacher's, many of which are equal: who has them must not matter."""
    student_BTV, teacher_BTV = 3 * torch.randn(2, B, T, ROWS, generator=torch.Generator().manual_seed(2))
    return student_BTV, teacher_BTV.round()


def divergences(rank: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Of each token, and the gradient of the student's logits: of a rank, or without ranks of whole rows."""
    found, loss = [], TokenLoss(VOCAB)
    if rank is not None:
        loss = VocabParallelTokenLoss(TensorParallel(dist.group.WORLD, rank, RANKS, 1, dist.group.WORLD, False), VOCAB)
    for top_k in TOP_K:
        student_BTV, teacher_BTV = (x if rank is None else x.chunk(RANKS, -1)[rank] for x in compared())
        student_BTV = student_BTV.clone().requires_grad_()
        kl_BT = loss.divergence(student_BTV, teacher_BTV, 2.0, top_k)
        (gradient_BTV,) = torch.autograd.grad(kl_BT, student_BTV, whole()[3])
        found.append((kl_BT.detach(), gradient_BTV))
    return found


def divergences_of_rank() -> list[tuple[Tensor, Tensor]]:
    return divergences(dist.get_rank())


def test_the_divergence_from_a_teacher_is_that_of_whole_rows() -> None:
    for rank, found in enumerate(run_on_ranks(RANKS, divergences_of_rank)):
        for (kl_BT, gradient_BTV), (expected_BT, whole_BTV) in zip(found, divergences(), strict=True):
            torch.testing.assert_close(kl_BT, expected_BT)
            torch.testing.assert_close(gradient_BTV, whole_BTV.chunk(RANKS, -1)[rank])


def test_the_linear_loss_keeps_neither_logits_nor_gathered_states(found: list[list[Found]]) -> None:
    kept = {case: ranks_kept for case, (*_, ranks_kept) in zip(CASES, found[0], strict=True)}
    tokens = B * T * 4
    weight, labels, normalizer = ROWS // RANKS * D * 4, 2 * tokens, tokens
    assert kept[False, False, True, False] == weight + labels + normalizer + tokens * D
    assert kept[True, False, True, False] == weight + labels + normalizer + tokens * D // RANKS
    assert kept[True, False, False, False] >= tokens * ROWS // RANKS, "with logits those are kept"
