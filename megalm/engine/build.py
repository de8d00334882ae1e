"""From a one-device model and a configuration to a DeepSpeed engine that trains it."""

import contextlib
import io
from collections.abc import Mapping
from typing import Any, Protocol

import deepspeed
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from torch import nn
from torch.distributed import ProcessGroup

from megalm.config.deepspeed.write import engine_json
from megalm.config.sections import RunConfig
from megalm.config.training import OptimizerConfig, PrecisionConfig
from megalm.distributed.context import RankContext
from megalm.distributed.groups import MeshGroups
from megalm.distributed.shards import ShardSpec
from megalm.engine import deepspeed_patches
from megalm.engine.batch_memory import BatchMemory
from megalm.engine.engine import Engine
from megalm.engine.host_memory import FreedMemory
from megalm.engine.master_weights import MasterWeights, with_masters
from megalm.engine.mpu import DeepSpeedMpu
from megalm.engine.optimizers import OPTIMIZERS
from megalm.engine.optimizers.spec import Placed, Surroundings
from megalm.engine.pipeline_gradients import StageGradients
from megalm.engine.runner import Runner, WholeModel
from megalm.engine.state import state_parts
from megalm.kernels.backend import Kernels
from megalm.models.dtypes import DTYPES


def connect_deepspeed() -> None:
    """Let DeepSpeed use the process group that already stands."""
    deepspeed_patches.silence()
    deepspeed_patches.without_shared_memory_collectives()
    deepspeed_patches.without_compiled_muon()
    deepspeed_patches.without_dynamo_in_optimizers()
    deepspeed_patches.allow_fp16_on_cpu()
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


class Stages(Protocol):
    """This rank's stages of a pipeline, and how they run."""

    @property
    def shared(self) -> tuple[nn.Parameter, ...]:
        """Parameters of this rank that another stage holds as well."""

    @property
    def shared_over(self) -> ProcessGroup | None:
        """The ranks that hold them."""

    def runner(self, gradients: StageGradients) -> Runner:
        """What takes micro-batches through all stages; every rank calls it."""


class RankModel(Protocol):
    """What a rank holds of the model."""

    @property
    def module(self) -> nn.Module:
        """The whole model, or this rank's stages."""

    @property
    def shard_specs(self) -> Mapping[str, ShardSpec]:
        """Of every parameter of the whole model, by name: which part of it is here."""

    @property
    def pipeline(self) -> Stages | None:
        """The stages of a pipeline; None where the module is the whole model."""


def build_engine(model: RankModel, config: RunConfig, context: RankContext, kernels: Kernels) -> Engine:
    """The engine around `model`, which it moves to the rank's device and casts; ZeRO spreads over `groups.weights`.

    The learning rate is set at every step, by `Engine.train_step`.
    """
    connect_deepspeed()
    module, groups = model.module, context.groups
    final_json = engine_json(config, groups.data.size)
    zero_stage = int(final_json["zero_optimization"]["stage"])
    if zero_stage == 0:
        module.to(device=context.device, dtype=DTYPES[config.precision.dtype])
        final_json = _for_replicated(final_json)
    else:
        final_json = final_json | {"zero_allow_untested_optimizer": True}  # DeepSpeed knows AdamW by its exact class
    mark_owned(module, model.shard_specs)
    optimizer = _build_optimizer(
        module, final_json, config.optimizer, config.precision, groups, model.shard_specs, kernels
    )
    with contextlib.redirect_stdout(io.StringIO()):  # BF16_Optimizer prints its memory use line by line
        ds_engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=final_json, mpu=DeepSpeedMpu(groups), dist_init_required=False
        )
    names = {parameter: name for name, parameter in module.named_parameters()}
    memory = BatchMemory.build(config, groups, DTYPES[config.precision.dtype], context.device)
    base = optimizer.base if isinstance(optimizer, MasterWeights) else optimizer
    if isinstance(base, Placed) and zero_stage < 3:
        base.place(state_parts(ds_engine, zero_stage, names, model.shard_specs))
    return Engine(
        ds_engine=ds_engine,
        zero_stage=zero_stage,
        runner=_build_runner(ds_engine, zero_stage, model.pipeline, groups, memory),
        names=names,
        shard_specs=model.shard_specs,
        device=context.device,
        groups=groups,
        freed_memory=FreedMemory(context.device.type == "cpu"),
        state_kinds=OPTIMIZERS[config.optimizer.optimizer].state_kinds,
        memory=memory,
    )


def _build_runner(
    ds_engine: Any, zero_stage: int, pipeline: Stages | None, groups: MeshGroups, memory: BatchMemory | None
) -> Runner:
    """How micro-batches go through the model."""
    if pipeline is None:
        # sequence parallelism needs equal parts
        return WholeModel(ds_engine, zero_stage, length_multiple=groups.tensor.size, memory=memory)
    assert memory is None, "the rules of a run leave memory to whole models"
    if zero_stage > 0:
        deepspeed_patches.agree_on_norm(ds_engine.optimizer, zero_stage)
    return pipeline.runner(StageGradients(ds_engine, zero_stage, pipeline.shared, pipeline.shared_over))


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
        model_parallel_group=groups.model_copy.group,
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
