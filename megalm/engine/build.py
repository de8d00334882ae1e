"""From a one-device model and a configuration to a DeepSpeed engine that trains it."""

import contextlib
import io
import logging
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from torch import nn
from torch.distributed import ProcessGroup

from megalm.config.training import OptimizerConfig, PrecisionConfig
from megalm.distributed.groups import MeshGroups
from megalm.distributed.shards import ShardSpec
from megalm.engine.cpu_adam import build_cpu_adam
from megalm.engine.engine import Engine
from megalm.engine.host_memory import FreedMemory
from megalm.engine.mpu import DeepSpeedMpu
from megalm.engine.norm import agree_on_norm
from megalm.engine.optimizer import ReplicatedAdamW, ShardedAdamW, adam_options, mark_owned, parameter_groups
from megalm.engine.pipeline_gradients import PipelineSpec
from megalm.kernels.choice import REFERENCE, Kernels
from megalm.models.dtypes import DTYPES


def connect_deepspeed() -> None:
    """Let DeepSpeed use the process group that already stands.

    Its shared-memory collectives are turned off: they are compiled at first use by every rank, past the start-up bound,
    and leave segments in /dev/shm when a rank is killed.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates, once per call and rank
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # DeepSpeed allows fp16 only where oneDNN has fast fp16 products; torch computes it on every CPU
        accelerator.is_fp16_supported = lambda: True
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def build_engine(
    model: nn.Module,
    engine_json: dict[str, Any],
    optimizer_config: OptimizerConfig,
    precision: PrecisionConfig,
    device: torch.device,
    groups: MeshGroups,
    shard_specs: Mapping[str, ShardSpec],
    pipeline_spec: PipelineSpec | None = None,
    kernels: Kernels = REFERENCE,
) -> Engine:
    """The engine around `model`, which it moves to `device` and casts; ZeRO spreads over `groups.weights`.

    `shard_specs` says of every parameter of the whole model, by name, which part of it is here. With `pipeline_spec`,
    `model` holds this rank's stages of a pipeline. `engine_json` is the final DeepSpeed configuration
    (`config.engine_json`): its ZeRO stage decides who keeps which part of the state. The learning rate is set at every
    step, by `Engine.train_step`.
    """
    connect_deepspeed()
    stage = int(engine_json["zero_optimization"]["stage"])
    if stage == 0:
        model.to(device=device, dtype=DTYPES[precision.dtype])
        engine_json = _for_replicated(engine_json)
    mark_owned(model, shard_specs)
    decay_groups = parameter_groups(model, optimizer_config.weight_decay)
    if stage == 0:
        uncounted = {parameter for name, parameter in model.named_parameters() if not shard_specs[name].is_owner}
        optimizer = _build_replicated(
            decay_groups, optimizer_config, precision, uncounted, groups.model_copy.group, kernels
        )
    else:
        optimizer = _build_optimizer(decay_groups, engine_json, optimizer_config, kernels)
        if isinstance(optimizer, ShardedAdamW):  # DeepSpeed knows AdamW by its exact class
            engine_json = engine_json | {"zero_allow_untested_optimizer": True}
    with contextlib.redirect_stdout(io.StringIO()):  # BF16_Optimizer prints its memory use line by line
        ds_engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=engine_json, mpu=DeepSpeedMpu(groups), dist_init_required=False
        )
    if pipeline_spec is not None and stage > 0:
        agree_on_norm(ds_engine.optimizer, stage)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return Engine(
        ds_engine, stage, names, shard_specs, device, groups, pipeline_spec, FreedMemory(device.type == "cpu")
    )


def _for_replicated(engine_json: dict[str, Any]) -> dict[str, Any]:
    """At stage 0 ReplicatedAdamW does what DeepSpeed would for "bf16", "fp16" and "gradient_clipping"."""
    kept = {key: value for key, value in engine_json.items() if key not in ("bf16", "fp16", "data_types")}
    return kept | {"gradient_clipping": 0.0, "communication_data_type": "fp32"}


def _build_replicated(
    groups: list[dict[str, Any]],
    config: OptimizerConfig,
    precision: PrecisionConfig,
    uncounted: Collection[nn.Parameter],
    model_parallel_group: ProcessGroup,
    kernels: Kernels,
) -> torch.optim.Optimizer:
    """The optimizer of stage 0."""
    return ReplicatedAdamW(
        groups,
        clip_grad=config.clip_grad,
        accumulate_fp32=precision.grad_accum_dtype == "fp32",
        scaler=_build_scaler(precision) if precision.fp16 else None,
        uncounted=uncounted,
        model_parallel_group=model_parallel_group,
        kernels=kernels,
        **adam_options(config),
    )


def _build_optimizer(
    groups: list[dict[str, Any]], engine_json: dict[str, Any], config: OptimizerConfig, kernels: Kernels
) -> torch.optim.Optimizer:
    """The optimizer on which DeepSpeed builds stages 1 to 3."""
    if engine_json["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none":
        offloaded: torch.optim.Optimizer = build_cpu_adam()(groups, adamw_mode=True, **adam_options(config))
        return offloaded
    if kernels.sharded_adamw and kernels.adamw_step is not None:
        return ShardedAdamW(groups, kernels.adamw_step, **adam_options(config))
    return torch.optim.AdamW(groups, fused=True, **adam_options(config))


def _build_scaler(precision: PrecisionConfig) -> DynamicLossScaler | LossScaler:
    """The loss scaler that DeepSpeed uses at ZeRO 1 to 3, for stage 0."""
    if precision.loss_scale is not None:
        return LossScaler(scale=precision.loss_scale)
    return DynamicLossScaler(
        init_scale=precision.initial_loss_scale,
        scale_window=precision.loss_scale_window,
        min_scale=precision.min_loss_scale,
        delayed_shift=precision.hysteresis,
        consecutive_hysteresis=False,
    )
