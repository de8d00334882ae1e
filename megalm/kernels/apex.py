"""NVIDIA Apex's norms and AdamW in place of megalm's, where they are asked for (`--use-apex`), installed and NVIDIA's.

The package of the name "apex" on the Python index is an unrelated web toolkit. NVIDIA's is known by its modules, and
its CUDA extensions, which are built apart, are looked for too.
"""

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megalm.errors import PlatformError
from megalm.kernels.backend import Kernels
from megalm.kernels.support import changed

_MEMBERS = {
    "apex.normalization.fused_layer_norm": ("mixed_dtype_fused_layer_norm_affine", "mixed_dtype_fused_rms_norm_affine"),
    "apex.optimizers": ("FusedAdam",),
    "apex.multi_tensor_apply": ("multi_tensor_applier",),
}
_EXTENSIONS = ("fused_layer_norm_cuda", "amp_C")
_INSTEAD = "leave --use-apex out: megalm's own kernels need nothing"


def missing() -> str | None:
    """Why NVIDIA's Apex cannot be used by this Python; None: it can."""
    found = importlib.util.find_spec("apex")
    if found is None:
        return "apex is not installed"
    location = found.origin or ", ".join(found.submodule_search_locations or ())
    for name, members in _MEMBERS.items():
        try:
            module = importlib.import_module(name)
        except Exception as error:  # whatever another package of that name does
            return f"the package apex at {location} is not NVIDIA's: {name} does not import ({_first_line(error)})"
        lacking = next((member for member in members if not hasattr(module, member)), None)
        if lacking:
            return f"the package apex at {location} is not NVIDIA's, or a version without {name}.{lacking}"
    for name in _EXTENSIONS:
        try:
            importlib.import_module(name)
        except ImportError as error:
            return f"NVIDIA's apex at {location} lacks its CUDA extension {name} ({_first_line(error)})"
    return None


def check(device_type: str) -> None:
    """Make sure that `--use-apex` can be had on "cpu" or "cuda".

    Raises:
        PlatformError: Apex is not installed, not NVIDIA's or not whole, or the device is not a GPU.
    """
    reason = missing()
    if reason is not None:
        raise PlatformError(
            f"use_apex=true (--use-apex), but {reason}; install it from https://github.com/NVIDIA/apex with its CUDA "
            f"extensions, or {_INSTEAD}"
        )
    if device_type != "cuda":
        raise PlatformError(
            f"use_apex=true (--use-apex), but Apex's kernels run on CUDA devices only, not on {device_type}; {_INSTEAD}"
        )


def with_apex(kernels: Kernels) -> Kernels:
    """`kernels` with Apex's norms and AdamW; `check` has passed."""
    return replace(
        kernels,
        layer_norm=layer_norm,
        rms_norm=rms_norm,
        layer_norm_after_add=layer_norm_after_add,
        rms_norm_after_add=rms_norm_after_add,
        adamw_step=adamw_step,
        sharded_adamw=True,
    )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """`norm.layer_norm` by Apex; weight and bias may be wider than x."""
    shift = bias.to(weight.dtype)
    y: Tensor = _norms().mixed_dtype_fused_layer_norm_affine(x, weight, shift, tuple(weight.shape), epsilon)
    return y.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`norm.rms_norm` by Apex."""
    y: Tensor = _norms().mixed_dtype_fused_rms_norm_affine(x, weight, tuple(weight.shape), epsilon)
    return y.to(x.dtype)


def layer_norm_after_add(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """`norm.layer_norm_after_add` by Apex, whose norm does not add."""
    total = x if residual is None else x + residual
    return layer_norm(total, weight, bias, epsilon), total


def rms_norm_after_add(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`norm.rms_norm_after_add` by Apex, whose norm does not add."""
    total = x if residual is None else x + residual
    return rms_norm(total, weight, epsilon), total


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
    """`optimizer.adamw_step` by the kernel of Apex's FusedAdam."""
    if not masters:
        return
    grads = [grad.float() for grad in grads]
    if factor != 1.0:
        grads = torch._foreach_mul(grads, factor)
    skip = torch.zeros(1, dtype=torch.int32, device=masters[0].device)
    lists = [grads, *(list(tensors) for tensors in (masters, first, second))]
    kernel = importlib.import_module("amp_C").multi_tensor_adam
    apply = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
    decoupled, corrected = 1, 1
    apply(kernel, skip, lists, lr, *betas, eps, step, decoupled, corrected, weight_decay)
    changed(*masters, *first, *second)
    for model, master in zip(models, masters, strict=False):
        model.copy_(master)


def _norms() -> Any:
    return importlib.import_module("apex.normalization.fused_layer_norm")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
