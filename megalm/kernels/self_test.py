"""A quick look at every loaded kernel's numbers, so that a miscompiled one is refused and not trained with."""

from collections.abc import Callable

import torch
from torch import Tensor

from megalm.kernels import activation, attention, cross_entropy, dropout, embedding, norm, optimizer, rotary, softmax

Check = Callable[["Numbers", int], tuple[Tensor, Tensor]]
"""Of numbers and the length of a row: the fused result and the reference's."""

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


def first_failure(device: str = "cpu") -> str | None:
    """Name of the first kernel whose result on `device` is not its reference's, or None. Takes some 30 milliseconds."""
    for dtype, cols in _SIZES:
        for check in _CHECKS:
            with torch.enable_grad(), torch.device(device):
                result, expected = check(Numbers(device, dtype), cols)
            # the error of a bfloat16 gradient is that of the largest terms of its sum
            atol = _TOLERANCE[dtype] * (1.0 if dtype == torch.float32 else 1.0 + float(expected.abs().max()) / 4)
            if not torch.allclose(result, expected, rtol=_TOLERANCE[dtype], atol=atol):
                return check.__name__.removeprefix("_")
    return None


def _with_gradient(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The result and the gradient of its weighted sum, in one vector."""
    x = x.detach().clone().requires_grad_()
    y = run(x)
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
    (y.float() * weights).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    return torch.cat((y.detach().float().flatten(), x.grad.float().flatten()))


def _norm(numbers: Numbers, cols: int) -> tuple[Tensor, Tensor]:
    x, weight = numbers(5, cols), numbers(cols).float()
    fused = _with_gradient(lambda x: norm.fused_layer_norm(x, weight, weight, 1e-5), x)
    return fused, _with_gradient(lambda x: norm.layer_norm(x, weight, weight, 1e-5), x)


def _rotary(numbers: Numbers, cols: int) -> tuple[Tensor, Tensor]:
    x = numbers(2, 3, 2, cols + cols % 2)
    tables = rotary.rotary_tables(torch.arange(3)[None], x.shape[-1] - 4 * (cols % 2), 100.0)  # a part, where it is odd
    fused = _with_gradient(lambda x: rotary.fused_rotary(x, *tables), x)
    return fused, _with_gradient(lambda x: rotary.apply_rotary(x, *tables), x)


def _swiglu(numbers: Numbers, cols: int) -> tuple[Tensor, Tensor]:
    x, up = numbers(3, cols), numbers(3, cols)
    fused = _with_gradient(lambda x: activation.fused_swiglu(x, up), x)
    return fused, _with_gradient(lambda x: activation.swiglu(x, up), x)


def _gelu(numbers: Numbers, cols: int) -> tuple[Tensor, Tensor]:
    x, bias = numbers(3, cols), numbers(cols).float()
    kind = activation.Activation.GELU
    fused = _with_gradient(lambda x: activation.fused_bias_activation(x, bias, kind), x)
    return fused, _with_gradient(lambda x: activation.bias_activation(x, bias, kind), x)


def _cross_entropy(numbers: Numbers, cols: int) -> tuple[Tensor, Tensor]:
    x, labels = 3 * numbers(4, 40 + cols), torch.tensor([0, 3, 70, 9])
    fused = _with_gradient(lambda x: cross_entropy.fused_cross_entropy(x, labels, 34 + cols), x)
    return fused, _with_gradient(lambda x: cross_entropy.cross_entropy(x, labels, 34 + cols), x)


def _dropout(numbers: Numbers, cols: int) -> tuple[Tensor, Tensor]:
    x, bias = numbers(3, cols), numbers(cols).float()
    fused = _with_gradient(lambda x: dropout.fused_bias_dropout_add(x, bias, x, 0.0, True), x)
    return fused, _with_gradient(lambda x: dropout.bias_dropout_add(x, bias, x, 0.0, True), x)


def _embedding(numbers: Numbers, cols: int) -> tuple[Tensor, Tensor]:
    table, ids = numbers(7, cols), torch.tensor([[5, 1, 5], [0, 5, 3]])
    fused = _with_gradient(lambda table: embedding.fused_embedding(ids, table), table)
    return fused, _with_gradient(lambda table: embedding.embedding(ids, table), table)


def _softmax(numbers: Numbers, cols: int) -> tuple[Tensor, Tensor]:
    x = numbers(1, 2, 5, cols)
    fused = _with_gradient(lambda x: softmax.fused_masked_softmax(x, 0.5, causal=True), x)
    return fused, _with_gradient(lambda x: softmax.masked_softmax(x, 0.5, causal=True), x)


def _attention(numbers: Numbers, cols: int) -> tuple[Tensor, Tensor]:
    x = numbers(1, 70, 3, cols // 8)
    if x.is_cuda or x.dtype != torch.bfloat16 or not attention.own_kernel_runs():  # torch's own runs
        return x, x
    fused = _with_gradient(lambda x: attention.own_causal_attention(x, x, x), x)
    return fused, _with_gradient(lambda x: attention.causal_attention(x, x, x), x.float())


def _adamw(numbers: Numbers, cols: int) -> tuple[Tensor, Tensor]:
    results = []
    start = numbers(4, cols).float().abs()
    for step in (optimizer.fused_adamw_step, optimizer.adamw_step):
        master, first, second, grad = start.clone()
        options = {"factor": 0.5, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "step": 3}
        step([master], [first], [second], [grad], [], **options)  # type: ignore[arg-type]
        results.append(torch.cat((master, first, second)))
    return results[0], results[1]


def _l2_norm_and_scale(numbers: Numbers, cols: int) -> tuple[Tensor, Tensor]:
    start = [numbers(size) for size in (cols, 5000)]
    scaled = [x.clone() for x in start]
    optimizer.fused_scale_tensors(scaled, 0.5)
    fused = torch.cat((*scaled, optimizer.fused_l2_norm(start).float()[None]))
    return fused, torch.cat((*(x * 0.5 for x in start), optimizer.l2_norm(start).float()[None]))


_CHECKS: tuple[Check, ...] = (
    *(_norm, _rotary, _swiglu, _gelu, _dropout, _embedding),
    *(_cross_entropy, _softmax, _attention, _adamw, _l2_norm_and_scale),
)
