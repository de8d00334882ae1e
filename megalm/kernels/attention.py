"""Causal self-attention, in blocks that keep no scores: torch's kernels, or on some CPUs a faster one of ours.

Shapes: B batch, T positions, H query heads, G key/value heads, C head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.kernels.self_test import Check, Numbers, with_gradient
from megalm.kernels.support import constant_when_compiled


def causal_attention(q_BTHC: Tensor, k_BTGC: Tensor, v_BTGC: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v over the positions up to a query's own: (B, T, H, C), by torch's own kernels.

    H is a multiple of G: neighbouring query heads share a key/value head. Softmax in float32.
    """
    return torch_attention(q_BTHC, k_BTGC, v_BTGC, causal=True)


def torch_attention(
    q_BTHC: Tensor,
    k_BSGC: Tensor,
    v_BSGC: Tensor,
    *,
    causal: bool,
    visible: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The same with S keys: a query sees all of them, those up to its own position, or the `visible` ones.

    `visible` is bool (T, S), or anything that expands to (B, H, T, S).
    """
    y_BHTC = F.scaled_dot_product_attention(
        q_BTHC.transpose(1, 2),
        k_BSGC.transpose(1, 2),
        v_BSGC.transpose(1, 2),
        attn_mask=visible,
        dropout_p=dropout,
        is_causal=causal,
        enable_gqa=q_BTHC.shape[2] != k_BSGC.shape[2],
    )
    return y_BHTC.transpose(1, 2)


def fused_causal_attention(q_BTHC: Tensor, k_BTGC: Tensor, v_BTGC: Tensor) -> Tensor:
    """`causal_attention`; of bfloat16 on processors with AVX-512's products of it (and no AMX) by our own kernel.

    That works on blocks of 64 positions: a value that is not finite also shows in the positions of its own block that
    are before it. Source: Dao 2023, FlashAttention-2, arXiv:2307.08691.
    """
    takes = own_kernel_is_faster(q_BTHC, k_BTGC)
    return (own_causal_attention if takes else causal_attention)(q_BTHC, k_BTGC, v_BTGC)


def own_causal_attention(q_BTHC: Tensor, k_BTGC: Tensor, v_BTGC: Tensor) -> Tensor:
    """`causal_attention` by our own kernel, whatever is faster; C a multiple of 16.

    Raises:
        RuntimeError: not bfloat16, or a processor without `own_kernel_runs`.
    """
    y_BTHC: Tensor = torch.ops.megalm.attention(q_BTHC, k_BTGC, v_BTGC, q_BTHC.shape[-1] ** -0.5)[0]
    return y_BTHC


def own_kernel_runs() -> bool:
    """Whether this processor has AVX-512's products of bfloat16."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def own_kernel_is_faster(q_BTHC: Tensor, k_BTGC: Tensor) -> bool:
    """Whether our own kernel runs and beats torch's there: elsewhere it is not used."""
    return (
        q_BTHC.device.type == "cpu"
        and q_BTHC.dtype == torch.bfloat16
        and q_BTHC.shape[-1] % 16 == 0
        and _beats_torch(q_BTHC.shape[0] * k_BTGC.shape[2])
    )


@constant_when_compiled
def _beats_torch(groups: int) -> bool:
    """With AMX torch is faster; our backward spreads the key/value heads over the threads, torch's all heads."""
    has_amx = bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return own_kernel_runs() and not has_amx and groups >= torch.get_num_threads()


def register() -> None:
    """Fake implementations and gradient."""
    torch.library.register_fake("megalm::attention", _fake)
    torch.library.register_fake(
        "megalm::attention_backward",
        lambda grad, q, k, v, y, logsumexp, scale: tuple(x.new_empty(x.shape) for x in (q, k, v)),
    )
    torch.library.register_autograd("megalm::attention", _backward, setup_context=_setup)


def _fake(q_BTHC: Tensor, k_BTGC: Tensor, v_BTGC: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q_BTHC.shape
    return q_BTHC.new_empty(q_BTHC.shape), q_BTHC.new_empty((B, H, T), dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_BTHC, k_BTGC, v_BTGC, ctx.scale = inputs
    ctx.save_for_backward(q_BTHC, k_BTGC, v_BTGC, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_BTHC: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.megalm.attention_backward(grad_BTHC, *ctx.saved_tensors, ctx.scale)
    return (*grads, None)


def check_attention(numbers: Numbers, cols: int) -> tuple[Tensor, Tensor]:
    """Our own kernel with its gradient, where it runs."""
    x = numbers(1, 70, 3, cols // 8)
    if x.is_cuda or x.dtype != torch.bfloat16 or not own_kernel_runs():  # torch's own runs
        return x, x
    return (
        with_gradient(lambda x: own_causal_attention(x, x, x), x),
        with_gradient(lambda x: causal_attention(x, x, x), x.float()),
    )


CHECKS: tuple[Check, ...] = (check_attention,)
