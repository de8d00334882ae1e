"""The fused operators with what each side calls for them, and the least traffic of each: what kernels.py measures."""

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.kernels import (
    activation,
    apex,
    attention,
    cross_entropy,
    dropout,
    embedding,
    norm,
    optimizer,
    rotary,
)
from megalm.kernels.linear_cross_entropy import linear_cross_entropy

Function = Callable[..., Tensor | tuple[Tensor, ...]]
EPSILON = 1e-5


@dataclass(frozen=True)
class Sizes:
    """Rows and widths of the operands: Llama 124M's on CPUs, a 7B model's on GPUs."""

    tokens: int
    width: int
    ffn: int
    heads: int
    vocabulary: int
    loss_tokens: int
    weights: int
    deepspeed: bool = False
    """Whether DeepSpeed's CPU Adam takes part: it is compiled first, which takes minutes."""
    compiled: bool = True
    """Whether torch.compile's code takes part."""


SIZES = {
    "cpu": Sizes(16384, 768, 2048, 12, 50304, 2048, 32 * 2**20),
    "cuda": Sizes(32768, 4096, 11008, 32, 128256, 4096, 512 * 2**20),
}


@dataclass(frozen=True)
class Case:
    """One row: what each side calls, and the bytes that it must move."""

    name: str
    moved: int
    sides: dict[str, Callable[[], object]]


def size_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Results of an operator as a tuple."""
    return results if isinstance(results, tuple) else (results,)


def with_gradient(
    name: str,
    functions: dict[str, Function],
    inputs: Sequence[Tensor],
    *,
    kept: int | None = None,
    in_place: Sequence[str] = (),
) -> Iterator[Case]:
    """The forward and both passes of an operator; functions take the inputs, of which the floating ones get gradients.

    `kept` is what the backward must read of the forward: bytes, by default all inputs. Functions `in_place` write
    their gradient over an input: each side has inputs of its own.
    """
    calls: dict[str, Callable[[], object]] = {}
    steps: dict[str, Callable[[], object]] = {}
    results: tuple[Tensor, ...] = ()
    for side, function in functions.items():
        own = [x.clone() if side in in_place else x for x in inputs]
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in own]
        differentiable = [x for x in leaves if x.requires_grad]
        with torch.no_grad():
            results = as_tuple(function(*leaves))
        grads = tuple(torch.randn_like(result) for result in results)
        calls[side] = torch.no_grad()(functools.partial(function, *leaves))
        steps[side] = functools.partial(both_passes, function, leaves, differentiable, grads)
    read, written = size_of(inputs), size_of(results)
    floating = size_of([x for x in inputs if x.is_floating_point()])
    yield Case(name, read + written, calls)
    backward = (read if kept is None else kept) + written + floating
    yield Case(f"{name} + backward", read + written + backward, steps)


def both_passes(
    function: Function, leaves: Sequence[Tensor], differentiable: Sequence[Tensor], grads: Sequence[Tensor]
) -> object:
    """Forward, then the gradients of all inputs."""
    return torch.autograd.grad(as_tuple(function(*leaves)), differentiable, grads)


def compiled(formula: Function) -> Function:
    """torch.compile's code for it."""
    return torch.compile(formula, dynamic=False)


def liger(name: str, **options: object) -> Function | None:
    """A function of Liger-Kernel with these options, where it is installed and has it."""
    try:
        found = getattr(importlib.import_module("liger_kernel.transformers.functional"), name, None)
    except ImportError:
        return None
    return None if found is None else functools.partial(found, **options)


def sides(
    s: Sizes, fused: Function, formula: Function, peers: dict[str, Function | None] | None = None
) -> dict[str, Function]:
    """The functions of an operator by side."""
    found = {"megalm": fused, "torch": formula, "compiled": compiled(formula) if s.compiled else None, **(peers or {})}
    on_gpu = torch.get_default_device().type == "cuda"
    return {
        side: function
        for side, function in found.items()
        if function is not None and (on_gpu or side in ("megalm", "torch", "compiled"))
    }


def norms(s: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    """RMSNorm and LayerNorm, alone and after the residual's addition."""
    x, residual = torch.randn(2, s.tokens, s.width).to(dtype)
    weight, bias = torch.randn(2, s.width).to(dtype)
    shape = (s.width,)
    theirs = apex if apex.missing() is None else None
    rms = sides(
        s,
        lambda x, w: norm.fused_rms_norm(x, w, EPSILON),
        lambda x, w: F.rms_norm(x, shape, w, EPSILON),
        {
            "Liger": liger("liger_rms_norm", eps=EPSILON, in_place=False),
            "Apex": (lambda x, w: theirs.rms_norm(x, w, EPSILON)) if theirs else None,
        },
    )
    yield from with_gradient("RMSNorm", rms, (x, weight))
    layer = sides(
        s,
        lambda x, w, b: norm.fused_layer_norm(x, w, b, EPSILON),
        lambda x, w, b: F.layer_norm(x, shape, w, b, EPSILON),
        {
            "Liger": liger("liger_layer_norm", eps=EPSILON),
            "Apex": (lambda x, w, b: theirs.layer_norm(x, w, b, EPSILON)) if theirs else None,
        },
    )
    yield from with_gradient("LayerNorm", layer, (x, weight, bias))
    added_rms = sides(
        s,
        lambda x, r, w: norm.fused_rms_norm_after_add(x, r, w, EPSILON),
        lambda x, r, w: (F.rms_norm(total := x + r, shape, w, EPSILON), total),
    )
    yield from with_gradient("residual + RMSNorm", added_rms, (x, residual, weight), kept=size_of((x, x)))
    added_layer = sides(
        s,
        lambda x, r, w, b: norm.fused_layer_norm_after_add(x, r, w, b, EPSILON),
        lambda x, r, w, b: (F.layer_norm(total := x + r, shape, w, b, EPSILON), total),
    )
    yield from with_gradient("residual + LayerNorm", added_layer, (x, residual, weight, bias), kept=size_of((x, x)))


def rotations(s: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    """Rotary embedding of the queries."""
    length = 2048
    q = torch.randn(s.tokens // length, length, s.heads, s.width // s.heads).to(dtype)
    cos, sin = rotary.rotary_tables(torch.arange(length)[None], s.width // s.heads, 10000.0)
    both = sides(
        s,
        lambda x: rotary.fused_rotary(x, cos, sin),
        lambda x: rotary.apply_rotary(x, cos, sin),
    )
    yield from with_gradient("rotary", both, (q,), kept=0)


def activations(s: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    """Gated and plain activations of the MLP."""
    gate, up = torch.randn(2, s.tokens, s.ffn).to(dtype)
    yield from with_gradient(
        "SwiGLU", sides(s, activation.fused_swiglu, activation.swiglu, {"Liger": liger("liger_swiglu")}), (gate, up)
    )
    yield from with_gradient("GELU tanh", sides(s, activation.fused_gelu_tanh, activation.gelu_tanh), (gate,))


def attentions(s: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    """Causal attention without scores."""
    length = 512 if s.tokens <= SIZES["cpu"].tokens else 2048
    heads = torch.randn(3, max(1, s.tokens // 8 // length), length, s.heads, s.width // s.heads).to(dtype)
    both = sides(s, attention.fused_causal_attention, attention.causal_attention)
    yield from with_gradient("causal attention", both, tuple(heads))


def losses(s: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    """Cross entropy of logits, and of a linear head that never holds them all."""
    logits, labels = torch.randn(s.loss_tokens, s.vocabulary).to(dtype), torch.randint(s.vocabulary, (s.loss_tokens,))
    both = sides(
        s,
        lambda x, ids: cross_entropy.fused_cross_entropy(x, ids, in_place=x.requires_grad),
        lambda x, ids: F.cross_entropy(x.float(), ids, reduction="none"),
        {"Liger": liger("liger_cross_entropy", reduction="none")},
    )
    yield from with_gradient("cross entropy", both, (logits, labels), in_place=("megalm", "Liger"))
    x, weight = torch.randn(s.loss_tokens, s.width).to(dtype), 0.02 * torch.randn(s.vocabulary, s.width).to(dtype)
    chunked = sides(
        s,
        lambda x, w, ids: linear_cross_entropy(x, w, ids, fused=True),
        lambda x, w, ids: F.cross_entropy((x @ w.t()).float(), ids, reduction="none"),
    )
    yield from with_gradient("linear + cross entropy", chunked, (x, weight, labels))


def residuals(s: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    """Dropout and the residual."""
    x, residual = torch.randn(2, s.tokens, s.width).to(dtype)
    both = sides(
        s,
        lambda x, r: dropout.fused_dropout_add(x, r, 0.1),
        lambda x, r: dropout.dropout_add(x, r, 0.1),
    )
    yield from with_gradient("dropout + residual", both, (x, residual), kept=0)


def embeddings(s: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    """The gradient of a table; the rows are gathered by torch on every side."""
    table, ids = torch.randn(s.vocabulary, s.width).to(dtype), torch.randint(s.vocabulary, (s.tokens,))
    rows = size_of((table,)) // s.vocabulary * s.tokens
    both = sides(s, lambda t, i: embedding.fused_embedding(i, t), lambda t, i: embedding.embedding(i, t))
    _, step = with_gradient("embedding", both, (table, ids))
    yield Case(step.name, 3 * rows + size_of((table,)), step.sides)


def optimizers(s: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    """AdamW on float32 masters with the model's copy, and the norm of gradients."""
    shapes = [(s.weights // 8,)] * 8
    state = [[torch.rand(shape) for shape in shapes] for _ in range(4)]
    models = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    options = {"factor": 0.5, "lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": 10}
    step_compiled = compiled(optimizer.adamw_step)
    adam: dict[str, Callable[[], object]] = {
        "megalm": lambda: optimizer.fused_adamw_step(*state, models, **options),
        "torch": functools.partial(torch_adamw, state, models),
        "compiled": lambda: step_compiled(*state, models, **options),
    }
    if torch.get_default_device().type == "cuda" and apex.missing() is None:
        adam["Apex"] = lambda: apex.adamw_step(*state, models, **options)
    if s.deepspeed:
        adam["DeepSpeed"] = deepspeed_adamw(state, models)
    moved = sum(map(size_of, state)) + sum(map(size_of, state[:3])) + size_of(models)
    yield Case("AdamW with the model's copy", moved, adam)
    grads = state[3]
    norm_compiled = compiled(optimizer.l2_norm)
    yield Case(
        "L2 norm",
        size_of(grads),
        {
            "megalm": lambda: optimizer.fused_l2_norm(grads),
            "torch": lambda: optimizer.l2_norm(grads),
            "compiled": lambda: norm_compiled(grads),
        },
    )


def torch_adamw(state: list[list[Tensor]], models: list[Tensor]) -> None:
    """Scaling, torch's fused AdamW, and the copies."""
    masters, first, second, grads = state
    torch._foreach_mul_(grads, 1.0)
    steps = [torch.tensor(10.0) for _ in masters]
    options = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8}
    torch._fused_adamw_(masters, grads, first, second, [], steps, amsgrad=False, maximize=False, **options)
    torch._foreach_copy_(models, masters)


def deepspeed_adamw(state: list[list[Tensor]], models: list[Tensor]) -> Callable[[], object]:
    """DeepSpeed's CPU Adam, with the scaling and the copies."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiles itself, once

    parameters = [torch.nn.Parameter(master) for master in state[0]]
    adam = DeepSpeedCPUAdam(parameters, lr=1e-4, betas=(0.9, 0.95), adamw_mode=True, weight_decay=0.1)

    def step() -> None:
        torch._foreach_mul_(state[3], 1.0)
        for parameter, grad in zip(parameters, state[3], strict=True):
            parameter.grad = grad
        adam.step()
        torch._foreach_copy_(models, state[0])

    return step


OPERATORS = {
    "norm": norms,
    "rotary": rotations,
    "activation": activations,
    "attention": attentions,
    "loss": losses,
    "residual": residuals,
    "embedding": embeddings,
    "optimizer": optimizers,
}
