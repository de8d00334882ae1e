"""AdamW for DeepSpeed: parameter groups, and the optimizer with master weights that ZeRO stage 0 runs on."""

import itertools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megalm.config.training import OptimizerConfig
from megalm.distributed.shards import ShardSpec
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


def mark_owned(model: nn.Module, shard_specs: Mapping[str, ShardSpec]) -> None:
    """Tell DeepSpeed which parameters this rank counts in the gradient's norm: each is counted by one rank of a copy.

    DeepSpeed counts what is marked `model_parallel`, leaves out what is marked `ds_pipe_replicated`, and where nothing
    is marked counts on the first tensor-parallel rank. Stage 3 does not know the second mark; it counts everything on
    the first rank of a model copy, which indeed speaks for all that it holds, and elsewhere what has the first mark.
    """
    for name, parameter in model.named_parameters():
        counted = shard_specs[name].is_owner
        parameter.model_parallel = counted  # type: ignore[attr-defined]
        parameter.ds_pipe_replicated = not counted  # type: ignore[attr-defined]


def adam_options(config: OptimizerConfig) -> dict[str, Any]:
    """Keyword arguments of AdamW."""
    return {"lr": config.lr, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}


def _step_group(
    optimizer: torch.optim.AdamW,
    group: dict[str, Any],
    gradients: list[Tensor],
    models: list[Tensor],
    factor: float,
    adamw_step: Callable[..., None],
) -> None:
    """One step of a group whose every parameter has a gradient, by a kernel; states are those of torch's AdamW."""
    parameters = group["params"]
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
        models,
        factor=factor,
        lr=group["lr"],
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        step=int(states[0]["step"]),
    )


class ShardedAdamW(torch.optim.AdamW):
    """torch's AdamW whose step is a kernel: for ZeRO 1 to 3, whose flat parts of masters are its parameters."""

    def __init__(self, groups: list[dict[str, Any]], adamw_step: Callable[..., None], **options: Any) -> None:
        super().__init__(groups, **options)
        self.adamw_step = adamw_step

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update what has a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            given = [parameter for parameter in group["params"] if parameter.grad is not None]
            if given:
                gradients = [parameter.grad for parameter in given]
                _step_group(self, {**group, "params": given}, gradients, [], 1.0, self.adamw_step)


class ReplicatedAdamW(torch.optim.AdamW):
    """AdamW of ZeRO stage 0: every rank holds all fp32 master weights and moments.

    DeepSpeed averages the gradients (in fp32: `grad_dtype`), then calls `step`, which unscales, measures, clips,
    updates the masters and copies them to the model. DeepSpeed's own stage 0 cannot accumulate in fp32 under bf16.
    In fp32 the masters are the model's own parameters. The gradient's norm is that of the whole model, whose parts the
    ranks of `model_parallel_group` hold (None: only this one); another of them counts the parameters `uncounted`.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        clip_grad: float,
        accumulate_fp32: bool,
        scaler: Any = None,
        uncounted: Collection[nn.Parameter] = (),
        model_parallel_group: ProcessGroup | None = None,
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
        factor = 1.0 / self.loss_scale
        if self.scaler is not None:
            self.scaler.update_scale(self.overflow)
        if self.overflow:
            return
        if self.clip_grad > 0:
            factor *= min(1.0, self.clip_grad / (self._global_grad_norm + 1e-6))
        if self.kernels.adamw_step is None:
            self._update_by_torch(gradients, factor)
        else:
            self._update_in_one_pass(dict(zip(self.masters, gradients, strict=True)), factor, self.kernels.adamw_step)

    def _update_by_torch(self, gradients: list[Tensor], factor: float) -> None:
        """Scale, step and copy, one after the other."""
        if factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient
        super().step()
        for parameter, master in zip(self.model_parameters, self.masters, strict=True):
            if parameter is not master:
                parameter.copy_(master)
                master.grad = None

    def _update_in_one_pass(
        self, gradients: dict[nn.Parameter, Tensor], factor: float, adamw_step: Callable[..., None]
    ) -> None:
        """The same, each tensor read and written once."""
        model_of = dict(zip(self.masters, self.model_parameters, strict=True))
        for group in self.param_groups:
            masters = group["params"]
            models = [] if model_of[masters[0]] is masters[0] else [model_of[master].data for master in masters]
            _step_group(self, group, [gradients[master] for master in masters], models, factor, adamw_step)

    def _norm(self, gradients: list[Tensor]) -> float:
        """L2 norm of the whole model's gradient: every part counted by one rank of the model copy."""
        counted = list(itertools.compress(gradients, self.is_owner))
        squares = torch.zeros((), dtype=torch.float64, device=gradients[0].device)
        if counted:
            squares += self.kernels.l2_norm(counted).square()
        if self.model_parallel_group is not None and dist.get_world_size(self.model_parallel_group) > 1:
            dist.all_reduce(squares, group=self.model_parallel_group)
        return math.sqrt(float(squares))
