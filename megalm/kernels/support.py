"""Which tensors the fused operators take; all others go the reference path."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def constant_when_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """torch.compiler.assume_constant_result, which would load torch's compiler (seconds) to set this one mark."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def fused_takes(x: Tensor) -> bool:
    """Whether the fused operators have code for the dtype and the device of `x` (float64 stays on the reference)."""
    if x.dtype not in DTYPES:
        return False
    return x.device.type in ("cpu", "meta") or (x.device.type == "cuda" and _has_cuda_kernels())


@constant_when_compiled
def _has_cuda_kernels() -> bool:
    """Whether the loaded library registered kernels for CUDA tensors."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("megalm::norm", "CUDA")


def changed(*tensors: Tensor) -> None:
    """Tell autograd that an operator wrote over these tensors, so that a graph that still needs them is an error."""
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)
