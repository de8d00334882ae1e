"""From a one-device model and a configuration to a DeepSpeed engine that trains it."""

import contextlib
import io
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from torch import nn

from megalm.config.training import OptimizerConfig, PrecisionConfig
from megalm.distributed.groups import MeshGroups
from megalm.distributed.shards import ShardSpec
from megalm.engine import deepspeed_patches
from megalm.engine.engine import Engine
from megalm.engine.host_memory import FreedMemory
from megalm.engine.master_weights import MasterWeights, with_masters
from megalm.engine.mpu import DeepSpeedMpu
from megalm.engine.optimizers import OPTIMIZERS
from megalm.engine.optimizers.spec import Placed, Surroundings
from megalm.engine.pipeline_gradients import PipelineSpec
from megalm.engine.state import state_parts
from megalm.kernels.choice import REFERENCE, Kernels
from megalm.models.dtypes import DTYPES


def connect_deepspeed() -> None:
    """Let DeepSpeed use the process group that already stands."""
    deepspeed_patches.silence()
    deepspeed_patches.without_shared_memory_collectives()
    deepspeed_patches.allow_fp16_on_cpu()
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
    """The engine around `model`, which it moves to `device` and casts; ZeRO spreads over the dp axis of `groups`.

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
    else:
        engine_json = engine_json | {"zero_allow_untested_optimizer": True}  # DeepSpeed knows AdamW by its exact class
    mark_owned(model, shard_specs)
    optimizer = _build_optimizer(model, engine_json, optimizer_config, precision, groups, shard_specs, kernels)
    with contextlib.redirect_stdout(io.StringIO()):  # BF16_Optimizer prints its memory use line by line
        ds_engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=engine_json, mpu=DeepSpeedMpu(groups), dist_init_required=False
        )
    if pipeline_spec is not None and stage > 0:
        deepspeed_patches.agree_on_norm(ds_engine.optimizer, stage)
    names = {parameter: name for name, parameter in model.named_parameters()}
    base = optimizer.base if isinstance(optimizer, MasterWeights) else optimizer
    if isinstance(base, Placed) and stage < 3:
        base.place(state_parts(ds_engine, stage, names, shard_specs))
    return Engine(
        ds_engine,
        stage,
        names,
        shard_specs,
        device,
        groups,
        OPTIMIZERS[optimizer_config.optimizer].state_kinds,
        pipeline_spec,
        FreedMemory(device.type == "cpu"),
    )


def _for_replicated(engine_json: dict[str, Any]) -> dict[str, Any]:
    """At stage 0 MasterWeights does what DeepSpeed would for "bf16", "fp16" and "gradient_clipping"."""
    kept = {key: value for key, value in engine_json.items() if key not in ("bf16", "fp16", "data_types")}
    return kept | {"gradient_clipping": 0.0, "communication_data_type": "fp32"}


def _build_optimizer(
    model: nn.Module,
    engine_json: dict[str, Any],
    config: OptimizerConfig,
    precision: PrecisionConfig,
    groups: MeshGroups,
    shard_specs: Mapping[str, ShardSpec],
    kernels: Kernels,
) -> torch.optim.Optimizer:
    """What --optimizer names; at stage 0 with what DeepSpeed does around it at stages 1 to 3."""
    spec, zero = OPTIMIZERS[config.optimizer], engine_json["zero_optimization"]
    surroundings = Surroundings(
        zero_stage=int(zero["stage"]),
        kernels=kernels,
        groups=groups,
        offloaded=zero.get("offload_optimizer", {}).get("device", "none") != "none",
    )
    parameter_groups = spec.parameter_groups(dict(model.named_parameters()), config)
    if surroundings.zero_stage > 0:
        return spec.build(parameter_groups, config, surroundings)
    master_groups, models = with_masters(parameter_groups)
    return MasterWeights(
        spec.build(master_groups, config, surroundings),
        models,
        clip_grad=config.clip_grad,
        accumulate_fp32=precision.grad_accum_dtype == "fp32",
        scaler=_build_scaler(precision) if precision.fp16 else None,
        uncounted={parameter for name, parameter in model.named_parameters() if not shard_specs[name].is_owner},
        model_parallel_group=groups.model_parallel_group,
        kernels=kernels,
    )


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
