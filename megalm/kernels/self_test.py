"""A quick look at every loaded kernel's numbers, so that a miscompiled one is refused and not trained with."""

from collections.abc import Callable

import torch
from torch import Tensor

from megalm.kernels import activation, attention, cross_entropy, dropout, embedding, norm, optimizer, rotary, softmax

Check = Callable[[torch.Generator], tuple[Tensor, Tensor]]


def first_failure(device: str = "cpu") -> str | None:
    """Name of the first kernel whose result on `device` is not its reference's, or None. Takes some milliseconds."""
    for check in _CHECKS:
        generator = torch.Generator(device).manual_seed(0)
        with torch.enable_grad(), torch.device(device):
            result, expected = check(generator)
        if not torch.allclose(result, expected, rtol=1e-4, atol=1e-4):
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


def _norm(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, weight = torch.randn(5, 37, generator=generator), torch.randn(37, generator=generator)
    fused = _with_gradient(lambda x: norm.fused_layer_norm(x, weight, weight, 1e-5), x)
    return fused, _with_gradient(lambda x: norm.layer_norm(x, weight, weight, 1e-5), x)


def _rotary(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 3, 2, 38, generator=generator)
    tables = rotary.rotary_tables(torch.arange(3)[None], 34, 100.0)
    fused = _with_gradient(lambda x: rotary.fused_rotary(x, *tables), x)
    return fused, _with_gradient(lambda x: rotary.apply_rotary(x, *tables), x)


def _swiglu(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, up = torch.randn(3, 37, generator=generator), torch.randn(3, 37, generator=generator)
    fused = _with_gradient(lambda x: activation.fused_swiglu(x, up), x)
    return fused, _with_gradient(lambda x: activation.swiglu(x, up), x)


def _gelu(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, bias = torch.randn(3, 37, generator=generator), torch.randn(37, generator=generator)
    kind = activation.Activation.GELU
    fused = _with_gradient(lambda x: activation.fused_bias_activation(x, bias, kind), x)
    return fused, _with_gradient(lambda x: activation.bias_activation(x, bias, kind), x)


def _cross_entropy(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, labels = 3 * torch.randn(4, 77, generator=generator), torch.tensor([0, 3, 70, 9])
    fused = _with_gradient(lambda x: cross_entropy.fused_cross_entropy(x, labels, 71), x)
    return fused, _with_gradient(lambda x: cross_entropy.cross_entropy(x, labels, 71), x)


def _dropout(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, bias = torch.randn(3, 37, generator=generator), torch.randn(37, generator=generator)
    fused = _with_gradient(lambda x: dropout.fused_bias_dropout_add(x, bias, x, 0.0, True), x)
    return fused, _with_gradient(lambda x: dropout.bias_dropout_add(x, bias, x, 0.0, True), x)


def _embedding(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    table, ids = torch.randn(7, 37, generator=generator), torch.tensor([[5, 1, 5], [0, 5, 3]])
    fused = _with_gradient(lambda table: embedding.fused_embedding(ids, table), table)
    return fused, _with_gradient(lambda table: embedding.embedding(ids, table), table)


def _softmax(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(1, 2, 5, 37, generator=generator)
    fused = _with_gradient(lambda x: softmax.fused_masked_softmax(x, 0.5, causal=True), x)
    return fused, _with_gradient(lambda x: softmax.masked_softmax(x, 0.5, causal=True), x)


def _attention(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(1, 70, 3, 32, generator=generator).bfloat16()
    if not attention.attention_takes(x):  # torch's own runs
        return x, x
    fused = _with_gradient(lambda x: attention.fused_causal_attention(x, x, x), x)
    expected = _with_gradient(lambda x: attention.causal_attention(x, x, x), x.float())
    near = (fused - expected).abs() <= 0.02 * (1 + expected.abs())  # numbers of 8 bits
    return torch.where(near, expected, fused), expected


def _adamw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    results = []
    start = torch.rand(4, 37, generator=generator)
    for step in (optimizer.fused_adamw_step, optimizer.adamw_step):
        master, first, second, grad = start.clone()
        options = {"factor": 0.5, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "step": 3}
        step([master], [first], [second], [grad], [], **options)  # type: ignore[arg-type]
        results.append(torch.cat((master, first, second)))
    return results[0], results[1]


def _l2_norm_and_scale(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    start = [torch.randn(size, generator=generator) for size in (37, 5000)]
    scaled = [x.clone() for x in start]
    optimizer.fused_scale_tensors(scaled, 0.5)
    fused = torch.cat((*scaled, optimizer.fused_l2_norm(start).float()[None]))
    return fused, torch.cat((*(x * 0.5 for x in start), optimizer.l2_norm(start).float()[None]))


_CHECKS: tuple[Check, ...] = (
    *(_norm, _rotary, _swiglu, _gelu, _dropout, _embedding),
    *(_cross_entropy, _softmax, _attention, _adamw, _l2_norm_and_scale),
)
