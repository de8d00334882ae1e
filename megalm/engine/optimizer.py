"""AdamW for DeepSpeed: parameter groups, and the optimizer with master weights that ZeRO stage 0 runs on."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from megalm.config.training import OptimizerConfig
from megalm.engine.stage_gradients import is_copy


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices with weight decay; norms and biases (fewer than two dims) without.

    Shapes are read from `ds_shape` where ZeRO-3 has taken the values away.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (decayed if len(shape) >= 2 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adam_options(config: OptimizerConfig) -> dict[str, Any]:
    """Keyword arguments of AdamW."""
    return {"lr": config.lr, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}


class ReplicatedAdamW(torch.optim.AdamW):
    """AdamW of ZeRO stage 0: every rank holds all fp32 master weights and moments.

    DeepSpeed averages the gradients (in fp32: `grad_dtype`), then calls `step`, which unscales, measures, clips,
    updates the masters and copies them to the model. DeepSpeed's own stage 0 cannot accumulate in fp32 under bf16.
    In fp32 the masters are the model's own parameters. `replica` is the group that shares one copy of the model: the
    norm is that of all its gradients, so that its ranks clip and skip alike.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        clip_grad: float,
        accumulate_fp32: bool,
        replica: ProcessGroup | None = None,
        scaler: Any = None,
        **options: Any,
    ) -> None:
        self.model_parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self.masters: list[nn.Parameter] = []
        for parameter in self.model_parameters:
            if parameter.dtype == torch.float32:
                self.masters.append(parameter)
                continue
            if accumulate_fp32:
                parameter.grad_dtype = torch.float32
            self.masters.append(nn.Parameter(parameter.detach().float()))
        master_of = dict(zip(self.model_parameters, self.masters, strict=True))
        groups = [{**group, "params": [master_of[p] for p in group["params"]]} for group in groups]
        super().__init__(groups, fused=True, **options)
        self.clip_grad = clip_grad
        self.replica = replica
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
        factor = 1.0 / self.loss_scale
        if self.scaler is not None:
            self.scaler.update_scale(self.overflow)
        if self.overflow:
            return
        if self.clip_grad > 0:
            factor *= min(1.0, self.clip_grad / (self._global_grad_norm + 1e-6))
        if factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient
        super().step()
        for parameter, master in zip(self.model_parameters, self.masters, strict=True):
            if parameter is not master:
                parameter.copy_(master)
                master.grad = None

    def _norm(self, gradients: list[torch.Tensor]) -> float:
        """L2 norm of the gradients of the whole model; what stands on several ranks counts once."""
        counted = [g for g, p in zip(gradients, self.model_parameters, strict=True) if not is_copy(p)]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(counted)))
        if self.replica is not None and dist.get_world_size(self.replica) > 1:
            squared = norm.double().square()
            dist.all_reduce(squared, group=self.replica)
            norm = squared.sqrt()
        return float(norm)
