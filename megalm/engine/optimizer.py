"""AdamW for DeepSpeed: parameter groups, and the optimizer with master weights that ZeRO stage 0 runs on."""

from typing import Any

import torch
from torch import nn

from megalm.config.training import OptimizerConfig
from megalm.kernels.choice import REFERENCE, Kernels


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
    In fp32 the masters are the model's own parameters.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        clip_grad: float,
        accumulate_fp32: bool,
        scaler: Any = None,
        kernels: Kernels = REFERENCE,
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
        self.scaler = scaler
        self.kernels = kernels
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
        gradients = [parameter.grad for parameter in self.model_parameters if parameter.grad is not None]
        assert len(gradients) == len(self.masters), "every parameter has a gradient"
        norm = self.kernels.l2_norm(gradients) / self.loss_scale
        self._global_grad_norm = float(norm)
        self.overflow = not bool(torch.isfinite(norm))
        factor = 1.0 / self.loss_scale
        if self.scaler is not None:
            self.scaler.update_scale(self.overflow)
        if self.overflow:
            return
        if self.clip_grad > 0:
            factor *= min(1.0, self.clip_grad / (self._global_grad_norm + 1e-6))
        self._apply(dict(zip(self.masters, gradients, strict=True)), factor)

    def _apply(self, gradients: dict[nn.Parameter, torch.Tensor], factor: float) -> None:
        """AdamW with every gradient times `factor`, and the new weights to the model."""
        model_of = dict(zip(self.masters, self.model_parameters, strict=True))
        for group in self.param_groups:
            masters = group["params"]
            states = [self._moments(master) for master in masters]
            for state in states:
                state["step"] += 1
            self.kernels.adamw_step(
                masters,
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [gradients[master].contiguous() for master in masters],
                [] if masters[0] is model_of[masters[0]] else [model_of[master] for master in masters],
                factor=factor,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                step=int(states[0]["step"]),
            )

    def _moments(self, master: nn.Parameter) -> dict[str, torch.Tensor]:
        """State of one parameter, made before its first step."""
        state = self.state[master]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
        return state
