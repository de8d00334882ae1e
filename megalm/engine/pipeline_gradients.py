"""The gradients of a step whose backward passes a pipeline schedule runs, handed to DeepSpeed at every ZeRO stage.

DeepSpeed expects one backward pass of the whole model at a time and hangs its reduction on autograd's hooks. A schedule
runs backward passes of single stages, in its own order, and zero-bubble ones without hooks. So the hooks are taken off,
and after each backward pass the gradients are put where the ZeRO stage accumulates them:

* 0: `grad` itself, fp32 under 16 bits too (`grad_dtype`); averaged at the end.
* 1: `grad`, or DeepSpeed's fp32 accumulators; averaged at the end.
* 2 and 3: averaged over the dp axis and added to the rank's fp32 part at once, so that no rank ever holds the
  accumulated gradients of a whole stage.

A weight that stands on the first and the last stage (tied embeddings) needs the sum over both before anything else is
done with it. Its two gradients of one micro-batch are ready at different times, so both ends keep theirs, in fp32,
until the step's last backward pass.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megalm.engine import deepspeed_patches

OnGradients = Callable[[Iterable[nn.Parameter]], None]


class StageGradients:
    """Collects the gradients of a step and ends it as DeepSpeed's optimizer wants.

    `shared` are the parameters of this rank that another stage holds as well, `shared_over` the ranks that hold them.
    """

    def __init__(
        self,
        ds_engine: Any,
        zero_stage: int,
        shared: tuple[nn.Parameter, ...] = (),
        shared_over: ProcessGroup | None = None,
    ) -> None:
        self._ds_engine = ds_engine
        self._optimizer = ds_engine.optimizer
        self._zero_stage = zero_stage
        self._shared = shared
        self._shared_over = shared_over
        self._held: dict[nn.Parameter, Tensor] = {}
        self._keeps_fp32 = hasattr(self._optimizer, "fp32_groups_gradients")  # BF16_Optimizer, at stage 1
        self._group_of = {p: number for number, g in enumerate(getattr(self._optimizer, "bit16_groups", [])) for p in g}
        deepspeed_patches.remove_gradient_hooks(self._optimizer)

    @contextmanager
    def collected(self) -> Iterator[OnGradients]:
        """Yields what is to be called after every backward pass of a stage; ends with averaged gradients."""
        self._begin()
        with self.parameters_at_hand():
            yield self._collect
        self._finish()

    def parameters_at_hand(self) -> AbstractContextManager[None]:
        """Where modules under ZeRO-3 gather parameters that they do not own."""
        return deepspeed_patches.parameters_at_hand(self._ds_engine.module) if self._zero_stage == 3 else nullcontext()

    def _begin(self) -> None:
        """Nothing is accumulated yet. The boundary comes in `_finish`, when all micro-batches are in."""
        self._ds_engine.set_gradient_accumulation_boundary(False)
        deepspeed_patches.accumulate_from_zero(self._optimizer, self._zero_stage)

    @torch.no_grad()
    def _collect(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put one stage's gradients of one micro-batch where they are accumulated."""
        optimizer = self._optimizer
        if self._zero_stage == 1:
            if self._keeps_fp32:
                optimizer.update_hp_grads(clear_lp_grads=True)
            else:
                optimizer.backward_epilogue()
        elif self._zero_stage >= 2:
            for parameter in self._shared:
                self._hold(parameter)
            self._reduce(parameters)

    def _hold(self, parameter: nn.Parameter) -> None:
        if parameter.grad is None:
            return
        if parameter in self._held:
            self._held[parameter] += parameter.grad
        else:
            self._held[parameter] = parameter.grad.float()
        parameter.grad = None

    def _reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the gradients over the dp axis and add them to this rank's part (ZeRO 1 to 3)."""
        optimizer = self._optimizer
        if self._zero_stage == 3:
            for parameter in parameters:
                if parameter.grad is not None:
                    optimizer.reduce_ready_partitions_and_remove_grads(parameter)
        else:
            optimizer.setup_buckets()
            for parameter in parameters:
                if optimizer.get_gradient_for_reduction(parameter) is not None:
                    optimizer.reduce_ready_partitions_and_remove_grads(parameter, self._group_of[parameter])
        optimizer.overlapping_partition_gradients_reduce_epilogue()

    @torch.no_grad()
    def _finish(self) -> None:
        ds_engine, optimizer = self._ds_engine, self._optimizer
        self._sum_shared()
        if self._zero_stage >= 2:
            self._reduce(self._shared)
            ds_engine.set_gradient_accumulation_boundary(True)
            optimizer.finalize_gradient_accumulation_boundary()
            return
        ds_engine.set_gradient_accumulation_boundary(True)
        if self._zero_stage == 1 and not self._keeps_fp32:
            self._reduce(self._group_of)
        else:
            ds_engine.allreduce_gradients()

    def _sum_shared(self) -> None:
        """Both ends get the sum of their gradients of each shared parameter."""
        for parameter in self._shared:
            total = self._accumulated(parameter)
            dist.all_reduce(total, group=self._shared_over)
            if self._zero_stage >= 2:
                deepspeed_patches.set_gradient(parameter, total.to(parameter.dtype))
        self._held.clear()

    def _accumulated(self, parameter: nn.Parameter) -> Tensor:
        """The tensor in which this parameter's gradient has been summed up."""
        if self._zero_stage >= 2:
            return self._held[parameter]
        optimizer = self._optimizer
        if self._keeps_fp32:
            for low, high in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
                for candidate, gradient in zip(low, high, strict=True):
                    if candidate is parameter:
                        return gradient  # type: ignore[no-any-return]
        gradient = parameter.grad if parameter.grad is not None else parameter.grad_accum  # type: ignore[attr-defined]
        assert gradient is not None, "a shared parameter has a gradient at both ends"
        return gradient
