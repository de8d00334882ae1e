"""The learning rate as a pure function of the step, so that resuming needs no scheduler state.

Shapes as in Megatron-LM's optimizer_param_scheduler; steps count from 1, so the first step already learns.
"""

import math
from collections.abc import Callable

from megalm.config.training import OptimizerConfig


def learning_rate(step: int, config: OptimizerConfig, total_iters: int) -> float:
    """Learning rate of optimizer step `step` (1 is the first) in a run of `total_iters` steps."""
    decay_iters = config.lr_decay_iters or total_iters
    warmup = warmup_iters(config, total_iters)
    if step <= warmup:
        return config.lr_warmup_init + (config.lr - config.lr_warmup_init) * step / warmup
    if config.lr_decay_style == "constant":
        return config.lr
    if step > decay_iters:
        return config.min_lr
    if config.lr_decay_style == "inverse-square-root":
        return max(config.min_lr, config.lr * math.sqrt(max(warmup, 1)) / math.sqrt(step))
    if config.lr_decay_style == "WSD":
        share = _wsd(step, config, decay_iters)
    else:
        share = _DECAY[config.lr_decay_style]((step - warmup) / (decay_iters - warmup))
    return config.min_lr + (config.lr - config.min_lr) * share


def warmup_iters(config: OptimizerConfig, total_iters: int) -> int:
    """Steps of linear warmup."""
    if config.lr_warmup_fraction is not None:
        return int(config.lr_warmup_fraction * (config.lr_decay_iters or total_iters))
    return config.lr_warmup_iters


def _wsd(step: int, config: OptimizerConfig, decay_iters: int) -> float:
    """Share of lr - min_lr in the warmup-stable-decay schedule (MiniCPM, arXiv:2404.06395)."""
    last_phase = config.lr_wsd_decay_iters or max(1, decay_iters // 10)
    start = decay_iters - last_phase
    if step <= start:
        return 1.0
    return _WSD_DECAY[config.lr_wsd_decay_style]((step - start) / last_phase)


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
