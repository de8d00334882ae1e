"""AdamW on float32 master weights, and the norm that gradient clipping needs, over lists of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megalm.kernels.self_test import Check, Numbers
from megalm.kernels.support import changed


def adamw_step(
    masters: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    grads: Sequence[Tensor],
    models: Sequence[Tensor],
    *,
    factor: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """One step of AdamW in place: masters, moments, and the model's copies (none, or one for each master).

    Gradients of any float dtype are multiplied by `factor` first. `step` counts from 1.
    Source: Loshchilov and Hutter 2019, "Decoupled weight decay regularization", algorithm 2.
    """
    beta1, beta2 = betas
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    for i, (master, m, v, grad) in enumerate(zip(masters, first, second, grads, strict=True)):
        wide = grad.float() * factor
        master.mul_(1 - lr * weight_decay)
        m.lerp_(wide, 1 - beta1)
        v.mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
        master.addcdiv_(m, (v.sqrt() / correction2**0.5).add_(eps), value=-lr / correction1)
        if models:
            models[i].copy_(master)


def fused_adamw_step(
    masters: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    grads: Sequence[Tensor],
    models: Sequence[Tensor],
    *,
    factor: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """`adamw_step` in one pass over memory, the scaling of the gradients included."""
    lists = [list(tensors) for tensors in (masters, first, second, grads, models)]
    torch.ops.megalm.adamw_(*lists, factor, lr, *betas, eps, weight_decay, step)
    changed(*masters, *first, *second, *models)


def l2_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Root of the sum of squares of all elements: a float64 scalar."""
    return torch.stack(torch._foreach_norm([tensor.float() for tensor in tensors])).double().square().sum().sqrt()


def fused_l2_norm(tensors: Sequence[Tensor]) -> Tensor:
    """`l2_norm` of contiguous tensors in one pass; the same result for every number of threads."""
    total: Tensor = torch.ops.megalm.square_sum(list(tensors))
    return total.sqrt()


def register() -> None:
    """Fake implementations."""
    torch.library.register_fake("megalm::adamw_", lambda *_: None)
    torch.library.register_fake("megalm::square_sum", lambda tensors: tensors[0].new_empty((), dtype=torch.float64))


def check_adamw(numbers: Numbers, cols: int) -> tuple[Tensor, Tensor]:
    """Masters and moments after a step."""
    results = []
    start = numbers(4, cols).float().abs()
    for step in (fused_adamw_step, adamw_step):
        master, first, second, grad = start.clone()
        options = {"factor": 0.5, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "step": 3}
        step([master], [first], [second], [grad], [], **options)  # type: ignore[arg-type]
        results.append(torch.cat((master, first, second)))
    return results[0], results[1]


def check_l2_norm(numbers: Numbers, cols: int) -> tuple[Tensor, Tensor]:
    """Of two tensors."""
    tensors = [numbers(size) for size in (cols, 5000)]
    return fused_l2_norm(tensors).float(), l2_norm(tensors).float()


CHECKS: tuple[Check, ...] = (check_adamw, check_l2_norm)
