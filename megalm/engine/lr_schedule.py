"""Learning rate and weight decay as pure functions of the sample, so that resuming needs no scheduler state.

Shapes and lengths as in Megatron-LM's optimizer_param_scheduler; a step's rate is the one at its own end, so that the
first step already learns.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from megalm.config.lengths import Lengths
from megalm.config.training import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What the optimizer takes a step with."""

    lr: float
    decoupled_lr: float
    """Learning rate of token embedding and output head."""
    weight_decay: float


def step_settings(position: float, config: OptimizerConfig, lengths: Lengths) -> StepSettings:
    """Learning rates and weight decay of the step that ends at sample `position` of the schedules."""
    rate = learning_rate(position, config, lengths)
    decoupled = rate
    if config.decoupled_lr is not None:
        end = config.min_lr if config.decoupled_min_lr is None else config.decoupled_min_lr
        own = config.model_copy(update={"lr": config.decoupled_lr, "min_lr": end})
        decoupled = learning_rate(position, own, lengths)
    return StepSettings(lr=rate, decoupled_lr=decoupled, weight_decay=weight_decay(position, config, lengths))


def learning_rate(position: float, config: OptimizerConfig, lengths: Lengths) -> float:
    """Learning rate of the step that ends at sample `position` of the schedules."""
    warmup, end = lengths.warmup, lengths.decay.samples
    if warmup > 0 and position <= warmup:
        return config.lr_warmup_init + (config.lr - config.lr_warmup_init) * position / warmup
    if config.lr_decay_style == "constant":
        return config.lr
    if position > end:
        return config.min_lr
    if config.lr_decay_style == "inverse-square-root":
        return max(config.min_lr, config.lr * math.sqrt(max(warmup, 1)) / math.sqrt(max(position, 1)))
    if config.lr_decay_style == "WSD":
        share = _wsd(position, config, lengths)
    else:
        share = _DECAY[config.lr_decay_style]((position - warmup) / (end - warmup))
    return config.min_lr + (config.lr - config.min_lr) * share


def weight_decay(position: float, config: OptimizerConfig, lengths: Lengths) -> float:
    """Weight decay of the step that ends at sample `position`; it grows over the whole run."""
    if config.weight_decay_incr_style == "constant":
        return config.weight_decay
    start, end = config.start_weight_decay, config.end_weight_decay
    assert start is not None, "checked: a style needs a start"
    assert end is not None, "checked: a style needs an end"
    progress = min(1.0, position / lengths.total.samples)
    share = progress if config.weight_decay_incr_style == "linear" else 0.5 * (1 - math.cos(math.pi * progress))
    return start + share * (end - start)


def _wsd(position: float, config: OptimizerConfig, lengths: Lengths) -> float:
    """Share of lr - min_lr in the warmup-stable-decay schedule (MiniCPM, arXiv:2404.06395)."""
    start = lengths.decay.samples - lengths.wsd_decay
    if position <= start:
        return 1.0
    return _WSD_DECAY[config.lr_wsd_decay_style]((position - start) / lengths.wsd_decay)


# progress 0..1 -> share of lr - min_lr that is left
_DECAY: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
_WSD_DECAY: dict[str, Callable[[float], float]] = {
    **_DECAY,
    "exponential": lambda progress: 2.0 * 0.5**progress - 1.0,
    "minus_sqrt": lambda progress: 1.0 - math.sqrt(progress),
}
