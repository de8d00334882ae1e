"""AdamW: torch's fused one, or one whose step is a kernel. Loshchilov and Hutter 2019, arXiv:1711.05101."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim

from megalm.config.training import OptimizerConfig
from megalm.engine.optimizers.spec import Groups, Surroundings, decay_groups

STATE = ("exp_avg", "exp_avg_sq")
NO_MODELS: Mapping[Tensor, Tensor] = {}


class AdamSpec:
    """The optimizer `adam`."""

    def state_kinds(self, name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        """First and second moment."""
        return STATE

    def parameter_groups(self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> Groups:
        """Matrices with weight decay, norms and biases without."""
        return decay_groups(parameters, config)

    def build(self, groups: Groups, config: OptimizerConfig, surroundings: Surroundings) -> optim.Optimizer:
        """torch's own, which in host memory needs nothing compiled either, or that of a kernel where it serves."""
        options, kernels = adam_options(config), surroundings.kernels
        sharded = kernels.sharded_adamw and not surroundings.offloaded
        if kernels.adamw_step is not None and (surroundings.zero_stage == 0 or sharded):
            return KernelAdamW(groups, kernels.adamw_step, **options)
        return optim.AdamW(groups, fused=True, **options)


def adam_options(config: OptimizerConfig) -> dict[str, Any]:
    """Keyword arguments of AdamW."""
    return {"lr": config.lr, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}


class KernelAdamW(optim.AdamW):
    """torch's AdamW whose step is a kernel, which can scale gradients and copy masters to the model as well."""

    def __init__(self, groups: Groups, adamw_step: Callable[..., None], **options: Any) -> None:
        super().__init__(groups, fused=True, **options)
        self.adamw_step = adamw_step

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update what has a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            given = [parameter for parameter in group["params"] if parameter.grad is not None]
            step_group(self, group, given, [parameter.grad for parameter in given], self.adamw_step)

    def scaled_step(
        self, gradients: Mapping[Tensor, Tensor], models: Mapping[Tensor, Tensor], grad_scale: float
    ) -> None:
        """`ScaledStep.scaled_step`."""
        for group in self.param_groups:
            masters = group["params"]
            found = [gradients[master] for master in masters]
            step_group(self, group, masters, found, self.adamw_step, models, grad_scale)


def step_group(
    optimizer: optim.Optimizer,
    group: dict[str, Any],
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    adamw_step: Callable[..., None],
    models: Mapping[Tensor, Tensor] = NO_MODELS,
    grad_scale: float = 1.0,
) -> None:
    """One step of `parameters` with the settings of their group, by a kernel; states are those of torch's AdamW."""
    if not parameters:
        return
    states: list[dict[str, Tensor]] = [optimizer.state[parameter] for parameter in parameters]
    for parameter, state in zip(parameters, states, strict=True):
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
    adamw_step(
        parameters,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [gradient.contiguous() for gradient in gradients],
        [models[parameter] for parameter in parameters] if parameters[0] in models else [],
        factor=grad_scale,
        lr=group["lr"],
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        step=int(states[0]["step"]),
    )
