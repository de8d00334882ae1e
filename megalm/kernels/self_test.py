"""A quick look at every loaded kernel's numbers, so that a miscompiled one is refused and not trained with.

Each operator's file has its checks: the fused result beside the reference's.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Check = Callable[["Numbers", int], tuple[Tensor, Tensor]]
"""Of numbers and the length of a row: the fused result and the reference's. Its name is `check_` and the kernel's."""

_SIZES = ((torch.float32, 37), (torch.float32, 512), (torch.bfloat16, 512))
"""Rows that vectors and wide loads do not divide, and such as models have."""
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-6}


class Numbers:
    """Random numbers of one dtype on the default device."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        """Normally distributed."""
        return torch.randn(shape, generator=self._generator).to(self.dtype)


def with_gradient(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The result and the gradient of its weighted sum, in one vector."""
    x = x.detach().clone().requires_grad_()
    y = run(x)
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
    (y.float() * weights).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    return torch.cat((y.detach().float().flatten(), x.grad.float().flatten()))


def first_failure(checks: Iterable[Check], device: str = "cpu") -> str | None:
    """Name of the first kernel whose result on `device` is not its reference's, or None. Takes some 30 milliseconds."""
    checks = tuple(checks)
    for dtype, cols in _SIZES:
        for check in checks:
            with torch.enable_grad(), torch.device(device):
                result, expected = check(Numbers(device, dtype), cols)
            # the error of a bfloat16 gradient is that of the largest terms of its sum
            atol = _TOLERANCE[dtype] * (1.0 if dtype == torch.float32 else 1.0 + float(expected.abs().max()) / 4)
            if not torch.allclose(result, expected, rtol=_TOLERANCE[dtype], atol=atol):
                return check.__name__.removeprefix("check_")
    return None
