"""fp32 master weights around an optimizer that every rank holds whole: ZeRO stage 0.

DeepSpeed's own stage 0 cannot accumulate in fp32 under bf16.
"""

import itertools
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.distributed import ProcessGroup

from megalm.engine.optimizers.spec import Groups, ScaledStep
from megalm.kernels.backend import REFERENCE, Kernels


def master_of(parameter: nn.Parameter) -> nn.Parameter:
    """The fp32 master of a model's parameter: itself where it is fp32."""
    return parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())


def with_masters(groups: Groups) -> tuple[Groups, dict[nn.Parameter, nn.Parameter]]:
    """The groups with masters in the place of the model's parameters, and the parameter of each master."""
    models: dict[nn.Parameter, nn.Parameter] = {}
    result = []
    for group in groups:
        masters = [master_of(parameter) for parameter in group["params"]]
        models.update(zip(masters, group["params"], strict=True))
        result.append({**group, "params": masters})
    return result, models


class MasterWeights(optim.Optimizer):
    """Unscale, measure, clip, step, copy to the model: around `base`, an optimizer of the masters.

    DeepSpeed averages the gradients (in fp32: `grad_dtype`), then calls `step`. The gradient's norm is that of the
    whole model, whose parts the ranks of `model_parallel_group` hold (None: only this one); another of them counts the
    parameters `uncounted`. To DeepSpeed this is the optimizer, so groups and state are those of `base`.
    """

    def __init__(
        self,
        base: optim.Optimizer,
        models: Mapping[nn.Parameter, nn.Parameter],
        *,
        clip_grad: float,
        accumulate_fp32: bool,
        scaler: Any = None,
        uncounted: Collection[nn.Parameter] = (),
        model_parallel_group: ProcessGroup | None = None,
        kernels: Kernels = REFERENCE,
    ) -> None:
        super().__init__(base.param_groups, base.defaults)
        self.state = base.state
        self.base = base
        self.masters, self.model_parameters = list(models), list(models.values())
        self._copies = {master: model for master, model in models.items() if master is not model}
        if accumulate_fp32:
            for parameter in self.model_parameters:
                if parameter.dtype != torch.float32:
                    parameter.grad_dtype = torch.float32
        self.model_parallel_group = model_parallel_group
        self.kernels = kernels
        self.is_owner = [parameter not in uncounted for parameter in self.model_parameters]
        self.clip_grad = clip_grad
        self.scaler = scaler
        self.overflow = False
        self._global_grad_norm = 0.0  # the name under which DeepSpeed's engine looks

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by before backward."""
        return float(self.scaler.cur_scale) if self.scaler is not None else 1.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update masters and model from the averaged gradients; skip the update if they are not finite."""
        assert closure is None, "closures are not supported"
        gradients = [parameter.grad.float() for parameter in self.model_parameters if parameter.grad is not None]
        assert len(gradients) == len(self.masters), "every parameter has a gradient"
        self._global_grad_norm = self._norm(gradients) / self.loss_scale
        self.overflow = not math.isfinite(self._global_grad_norm)
        grad_scale = 1.0 / self.loss_scale
        if self.scaler is not None:
            self.scaler.update_scale(self.overflow)
        if self.overflow:
            return
        if self.clip_grad > 0:
            grad_scale *= min(1.0, self.clip_grad / (self._global_grad_norm + 1e-6))
        if isinstance(self.base, ScaledStep):
            copies: dict[Tensor, Tensor] = {master: model.data for master, model in self._copies.items()}
            by_master: dict[Tensor, Tensor] = dict(zip(self.masters, gradients, strict=True))
            self.base.scaled_step(by_master, copies, grad_scale)
        else:
            self._scale_step_copy(gradients, grad_scale)

    def _scale_step_copy(self, gradients: list[Tensor], grad_scale: float) -> None:
        """The same, one after the other."""
        if grad_scale != 1.0:
            torch._foreach_mul_(gradients, grad_scale)
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient
        self.base.step()
        for master, model in self._copies.items():
            model.copy_(master)
            master.grad = None

    def _norm(self, gradients: list[Tensor]) -> float:
        """L2 norm of the whole model's gradient: every part counted by one rank of the model copy."""
        counted = list(itertools.compress(gradients, self.is_owner))
        squares = torch.zeros((), dtype=torch.float64, device=gradients[0].device)
        if counted:
            squares += self.kernels.l2_norm(counted).square()
        if self.model_parallel_group is not None and dist.get_world_size(self.model_parallel_group) > 1:
            dist.all_reduce(squares, group=self.model_parallel_group)
        return math.sqrt(float(squares))
