"""Lion: the sign of an interpolated momentum. Chen et al. 2023, arXiv:2302.06675, algorithm 2."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn, optim

from megalm.config.training import OptimizerConfig
from megalm.engine.optimizers.spec import Groups, Surroundings, decay_groups


class LionSpec:
    """The optimizer `lion`."""

    def state_kinds(self, name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The momentum: half of Adam's state."""
        return ("exp_avg",)

    def parameter_groups(self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> Groups:
        """Matrices with weight decay, norms and biases without."""
        return decay_groups(parameters, config)

    def build(self, groups: Groups, config: OptimizerConfig, surroundings: Surroundings) -> optim.Optimizer:
        """The same at every ZeRO stage: it goes by elements."""
        return Lion(groups, lr=config.lr, betas=(config.lion_beta1, config.lion_beta2))


class Lion(optim.Optimizer):
    """Per element: w -= lr (sign(b1 m + (1 - b1) g) + decay w), then m = b2 m + (1 - b2) g."""

    def __init__(self, groups: Groups, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update what has a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [parameter.grad for parameter in parameters]
            for parameter in parameters:
                if "exp_avg" not in self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
            moments = [self.state[parameter]["exp_avg"] for parameter in parameters]
            beta1, beta2 = group["betas"]
            directions = torch._foreach_lerp(moments, gradients, 1 - beta1)
            torch._foreach_sign_(directions)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, directions, alpha=-group["lr"])
            torch._foreach_lerp_(moments, gradients, 1 - beta2)
