"""What the activations of one rank's layers take, found by running them on tensors without values.

The model's own code runs, forward and backward, on fake tensors (`FakeTensorMode`): shapes and lifetimes are real,
values are not there, nothing is computed. So the figures follow the kernels and the recomputation that a run would use.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalm.config.model import ModelConfig
from megalm.config.recompute import RecomputeConfig
from megalm.kernels.choice import Kernels
from megalm.models.gpt import GPT
from megalm.models.layers import use_kernels
from megalm.models.loss import summed_loss
from megalm.parallel.recompute import apply_recompute


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages that operators inside have made and that still exist."""

    def __init__(self, free: Iterable[Tensor] = ()) -> None:
        """`free`: tensors made before, which are not counted."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._free = {tensor.untyped_storage()._cdata for tensor in free}
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}
        self.live = 0
        self.peak = 0

    def __enter__(self) -> "LiveStorages":
        resize, count = torch.UntypedStorage.resize_, self._count

        def counted_resize(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            count(storage)
            return result

        self._resize = resize
        # no operator: the mode would not see it
        torch.UntypedStorage.resize_ = counted_resize  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, then count what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._free:
            return
        if key in self._known:
            reference, before = self._known[key]
            if size != before:
                self._known[key] = (reference, size)
        else:
            reference, before = weakref.ref(storage, lambda _: self._forget(key)), 0
            self._known[key] = (reference, size)
        self.live += size - before
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)[1]


@dataclass(frozen=True, kw_only=True)
class ActivationBytes:
    """What one rank's activations take, beyond its weights and optimizer state."""

    saved: int
    """Alive after the forward pass of a micro-batch: kept for its backward pass."""
    peak_forward: int
    """The most during a forward pass, gradients of earlier micro-batches included."""
    peak_backward: int
    """The most during a backward pass, gradients included that stay with their parameters."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The part of a model that one rank runs: sizes are its share under tensor parallelism, layers its stage's."""

    model: ModelConfig
    rows: int
    """Rows of the vocabulary tables."""
    layers: tuple[int, ...]
    has_embedding: bool = True
    has_head: bool = True


def activation_bytes(
    part: Part,
    recompute: RecomputeConfig,
    kernels: Kernels,
    *,
    micro_batch_size: int,
    seq_length: int,
    dtype: torch.dtype,
    gradient_dtype: torch.dtype | None,
    micro_batches: int,
) -> ActivationBytes:
    """The activations of a step's micro-batches, run one after the other (two tell all: the second finds gradients).

    `gradient_dtype` is that of gradients that wait at their parameters for the end of the step; None: they are taken
    away at once (ZeRO).
    """
    with FakeTensorMode():
        model = GPT(part.model, part.rows, layers=part.layers, has_embedding=part.has_embedding, has_head=part.has_head)
        _cast(model, dtype)
        use_kernels(model, kernels)
        apply_recompute(model, recompute)
        for parameter in model.parameters():
            if gradient_dtype is None:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
            else:
                parameter.grad_dtype = gradient_dtype
        peaks = [0, 0, 0]
        with LiveStorages(model.parameters()) as live:
            for _ in range(min(micro_batches, 2)):
                _one_micro_batch(model, part, micro_batch_size, seq_length, dtype, live, peaks)
    return ActivationBytes(saved=peaks[0], peak_forward=peaks[1], peak_backward=peaks[2])


def _cast(model: GPT, dtype: torch.dtype) -> None:
    """`model.to(dtype)`, which fake parameters do not allow."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(parameter.detach().to(dtype)))


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _one_micro_batch(
    model: GPT, part: Part, rows: int, length: int, dtype: torch.dtype, live: LiveStorages, peaks: list[int]
) -> None:
    """Forward and backward pass of one micro-batch; notes saved bytes and the peaks of both in `peaks`."""
    before = live.live
    tokens_BT = torch.zeros(rows, length, dtype=torch.long)
    positions_BT = torch.arange(length)[None]
    live.peak = live.live
    if part.has_embedding:
        x_BTD = model.embed(tokens_BT, positions_BT)
    else:
        x_BTD = torch.zeros(rows, length, part.model.hidden_size, dtype=dtype, requires_grad=True)
    x_BTD = model.run_layers(x_BTD, positions_BT)
    result = summed_loss(model.token_losses(x_BTD, tokens_BT), torch.ones(rows, length)) if part.has_head else x_BTD
    del x_BTD
    peaks[0] = max(peaks[0], live.live - before)
    peaks[1] = max(peaks[1], live.peak)
    live.peak = live.live
    result.sum().backward()  # type: ignore[no-untyped-call]
    peaks[2] = max(peaks[2], live.peak)
