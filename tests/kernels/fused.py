"""The loaded library for tests of fused operators, or one skip that says why there is none."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from megalm.kernels.building import library, toolchain

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Relative error of one rounding to the dtype (and a few float32 roundings)."""
LOADED = library.load("auto")
needs_fused = pytest.mark.skipif(not LOADED.fused, reason=f"no fused kernels: {LOADED.reason}")
NO_GPU = toolchain.no_cuda() if torch.cuda.is_available() else "there is no CUDA device"
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=f"no CUDA kernels: {NO_GPU}")]
"""Marks of what runs on a GPU. Where one is, and nvcc, the kernels must load: only their absence skips."""

WIDEST = library.instruction_set(LOADED.path) if LOADED.path else 0
EMULATED = "emulated"
COPIES = {"AVX-512-bf16": 3, "AVX-512": 2, "AVX2": 1, "generic": 0, "CUDA-emulated": EMULATED, "CUDA": "cuda"}
"""Copies of the kernels: of the CPU's instruction sets, and of the CUDA sources on the CPU or on a GPU."""


def on_copies(**values):
    """Parametrizes a test by the copies of the kernels and by named lists of values.

    The widest copy that this processor has, and a GPU, see every combination; the others see every value once.
    """
    lists = list(values.values())
    every = list(itertools.product(*lists))
    few = [tuple(items[i % len(items)] for items in lists) for i in range(max(map(len, lists), default=1))]
    rows = []
    for name, copy in COPIES.items():
        marks = ON_GPU if copy == "cuda" else [needs_fused]
        for case in every if copy in (WIDEST, "cuda") else few:
            rows.append(pytest.param(copy, *case, id="-".join((name, *map(str, case))), marks=marks))
    return pytest.mark.parametrize(("_copy", *values), rows, indirect=["_copy"])


@contextmanager
def gpu() -> Iterator[None]:
    """While it lasts, new tensors are on the GPU, for which the kernels are loaded."""
    library.load("fused", "cuda")
    with torch.device("cuda"):
        yield


def leaf(*shape, dtype=torch.float32, scale=1.0):
    """Random numbers that require a gradient."""
    return (scale * torch.randn(shape)).to(dtype).requires_grad_()


def check(fused, reference, inputs, *, tolerance=None, atol=1e-6, grad_atol=None):
    """Results and gradients of `fused` against `reference` run in float64 on the same inputs."""
    dtype = inputs[0].dtype
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    wide = [x.detach().double().requires_grad_() for x in inputs]
    results, expected = fused(*inputs), reference(*wide)
    results, expected = (r if isinstance(r, tuple) else (r,) for r in (results, expected))
    weights = [torch.randn(e.shape, dtype=torch.float64) for e in expected]
    for result, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=max(atol, tolerance * 0.1))
    sum((r * w.to(r.dtype)).sum() for r, w in zip(results, weights, strict=True)).backward()
    sum((e * w.to(r.dtype).double()).sum() for r, e, w in zip(results, expected, weights, strict=True)).backward()
    for number, (x, exact) in enumerate(zip(inputs, wide, strict=True)):
        assert x.grad.dtype == x.dtype
        largest = float(exact.grad.abs().max()) if exact.grad.numel() else 1.0
        bound = max(atol, tolerance * max(1.0, largest)) if grad_atol is None else grad_atol
        torch.testing.assert_close(
            x.grad.double(), exact.grad, rtol=4 * tolerance, atol=bound, msg=lambda m, n=number: f"input {n}: {m}"
        )


def beside(*shape, dtype):
    """Random numbers that start one element beside an address that wide loads can read."""
    return torch.cat([torch.zeros(1), torch.randn(shape).flatten()]).to(dtype)[1:].view(shape)


def check_beside(fused, reference, dtype):
    """Results and gradients of a (5, 64) input where wide loads cannot read it, nor the gradient."""
    x = beside(5, 64, dtype=dtype)
    inputs, same = (x.detach().requires_grad_() for _ in range(2))
    y, expected = fused(inputs), reference(same)
    torch.testing.assert_close(y, expected, rtol=4 * TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])
    grad = beside(*y.shape, dtype=y.dtype)
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(inputs.grad, same.grad, rtol=8 * TOLERANCE[dtype], atol=8 * TOLERANCE[dtype])


def opcheck(name, *arguments):
    """torch's own checks of an operator: schema, fake implementation, autograd, dynamic shapes."""
    torch.library.opcheck(getattr(torch.ops.megalm, name).default, arguments)
