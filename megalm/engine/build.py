"""From what a rank holds of a model and a configuration to a DeepSpeed engine that trains it."""

import contextlib
import io
import logging
import warnings
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from torch import nn
from torch.distributed import ProcessGroup

from megalm.config import RunConfig, engine_json
from megalm.config.training import OptimizerConfig, PrecisionConfig
from megalm.distributed.context import RankContext
from megalm.distributed.groups import MeshGroups
from megalm.distributed.mesh import Axis
from megalm.distributed.shards import ShardSpec
from megalm.engine.cpu_adam import build_cpu_adam
from megalm.engine.engine import Engine
from megalm.engine.host_memory import FreedMemory
from megalm.engine.mpu import DeepSpeedMpu
from megalm.engine.norm import agree_on_norm
from megalm.engine.optimizer import ReplicatedAdamW, ShardedAdamW, adam_options, mark_owned, parameter_groups
from megalm.engine.pipeline_gradients import StageGradients
from megalm.engine.runner import Runner, WholeModel
from megalm.kernels.choice import Kernels
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
    """The engine around `model`, which it moves to the rank's device and casts; ZeRO spreads over the dp axis.

    The learning rate is set at every step, by `Engine.train_step`.
    """
    connect_deepspeed()
    module, groups, precision = model.module, context.groups, config.precision
    final_json = engine_json(config, context.mesh.size(Axis.DP))
    zero_stage = int(final_json["zero_optimization"]["stage"])
    if zero_stage == 0:
        module.to(device=context.device, dtype=DTYPES[precision.dtype])
        final_json = _for_replicated(final_json)
    mark_owned(module, model.shard_specs)
    decay_groups = parameter_groups(module, config.optimizer.weight_decay)
    if zero_stage == 0:
        uncounted = {p for name, p in module.named_parameters() if not model.shard_specs[name].is_owner}
        optimizer = _build_replicated(
            decay_groups, config.optimizer, precision, uncounted, groups.model_copy.group, kernels
        )
    else:
        optimizer = _build_optimizer(decay_groups, final_json, config.optimizer, kernels)
        if isinstance(optimizer, ShardedAdamW):  # DeepSpeed knows AdamW by its exact class
            final_json = final_json | {"zero_allow_untested_optimizer": True}
    with contextlib.redirect_stdout(io.StringIO()):  # BF16_Optimizer prints its memory use line by line
        ds_engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=final_json, mpu=DeepSpeedMpu(groups), dist_init_required=False
        )
    return Engine(
        ds_engine=ds_engine,
        zero_stage=zero_stage,
        runner=_build_runner(ds_engine, zero_stage, model.pipeline, groups),
        names={parameter: name for name, parameter in module.named_parameters()},
        shard_specs=model.shard_specs,
        device=context.device,
        groups=groups,
        freed_memory=FreedMemory(context.device.type == "cpu"),
    )


def _build_runner(ds_engine: Any, zero_stage: int, pipeline: Stages | None, groups: MeshGroups) -> Runner:
    """How micro-batches go through the model."""
    if pipeline is None:
        # sequence parallelism needs equal parts
        return WholeModel(ds_engine, zero_stage, length_multiple=groups.tensor.size)
    if zero_stage > 0:
        agree_on_norm(ds_engine.optimizer, zero_stage)
    return pipeline.runner(StageGradients(ds_engine, zero_stage, pipeline.shared, pipeline.shared_over))


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
