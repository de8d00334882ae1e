"""A checked run in, the dictionary for `deepspeed.initialize` out. The only place that knows what goes in there."""

import math
from copy import deepcopy
from typing import Any

from megalm.config.rules.batch import with_micro_batch_size
from megalm.config.sections import RunConfig
from megalm.config.training import PrecisionConfig

DEFAULT_ZERO_STAGE = 1
DEFAULT_BUCKET = 50_000_000
"""Elements of one reduce or all-gather. DeepSpeed's own 5e8 takes 1 to 2 GB a buffer, whatever the model's size."""


def zero_stage(config: RunConfig) -> int:
    """The ZeRO stage of the run."""
    stage = config.engine.zero_stage
    return DEFAULT_ZERO_STAGE if stage is None else stage


def offloads_optimizer(config: RunConfig) -> bool:
    """Whether the optimizer's state is in host memory, and its step there."""
    return _offloads(deepspeed_only(config).get("zero_optimization", {}), "offload_optimizer")


def _offloads(zero: dict[str, Any], block: str) -> bool:
    return bool(zero.get(block, {}).get("device", "none") != "none")


def engine_json(config: RunConfig, data_parallel_size: int) -> dict[str, Any]:
    """The final DeepSpeed configuration: no "auto", no optimizer or scheduler (those are handed over as objects)."""
    config = with_micro_batch_size(config, data_parallel_size)
    merged = deepspeed_only(config)
    stage = zero_stage(config)
    # DeepSpeed's data-parallel ranks are those with the same weights; those of one context-parallel group share samples
    copies = config.parallel.context_parallel_size
    merged["train_batch_size"] = config.batch.global_size(data_parallel_size) * copies
    merged["train_micro_batch_size_per_gpu"] = config.batch.micro_size
    merged["gradient_accumulation_steps"] = config.batch.accumulation(data_parallel_size)
    merged["gradient_clipping"] = config.optimizer.clip_grad
    merged["zero_optimization"] = zero_block(merged.get("zero_optimization", {}), stage)
    if offloads_optimizer(config):
        merged["zero_force_ds_cpu_optimizer"] = False  # DeepSpeed's own compiles for a minute before the first step
    merged |= precision_blocks(config.precision, merged)
    merged = gradient_types(config.precision, stage) | merged
    return merged


def zero_block(given: dict[str, Any], stage: int) -> dict[str, Any]:
    """The "zero_optimization" block of one stage, with buckets of a size that suits small and large runs."""
    buckets = {"reduce_bucket_size": DEFAULT_BUCKET, "allgather_bucket_size": DEFAULT_BUCKET} if stage else {}
    offload = {name for name in ("offload_optimizer", "offload_param") if not _offloads(given, name)}
    return buckets | {name: value for name, value in given.items() if name not in offload} | {"stage": stage}


def precision_blocks(precision: PrecisionConfig, given: dict[str, Any]) -> dict[str, Any]:
    """The "bf16" and "fp16" blocks; what the JSON says beside them is kept."""
    bf16 = given.get("bf16", {}) | {"enabled": precision.bf16}
    fp16 = given.get("fp16", {}) | {"enabled": precision.fp16}
    if precision.fp16:
        fp16 |= {
            "loss_scale": precision.loss_scale or 0,  # 0 is DeepSpeed's word for dynamic
            "initial_scale_power": int(math.log2(precision.initial_loss_scale)),
            "loss_scale_window": precision.loss_scale_window,
            "hysteresis": precision.hysteresis,
            "min_loss_scale": int(precision.min_loss_scale),
        }
    return {"bf16": bf16, "fp16": fp16}


def gradient_types(precision: PrecisionConfig, stage: int) -> dict[str, Any]:
    """The types in which gradients are accumulated and reduced.

    Stage 0 refuses a "data_types" block that differs from the model's type; there the engine accumulates itself.
    """
    if precision.dtype == "fp32" or precision.grad_accum_dtype == "model":
        return {}
    types: dict[str, Any] = {"communication_data_type": "fp32"}
    if stage >= 1:
        types["data_types"] = {"grad_accum_dtype": "fp32"}
    return types


def deepspeed_only(config: RunConfig) -> dict[str, Any]:
    """A copy of what the JSON says beyond megalm's own settings; `load_config` put it into the section."""
    given = config.engine.deepspeed_config
    assert not isinstance(given, str), f"load_config reads deepspeed_config={given}"
    return deepcopy(given) if given else {}
