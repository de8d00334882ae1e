"""The parts of a run, built from its configuration in the order in which the data flows."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint.run_folder import write_config
from megalm.commands.generate import Sampler
from megalm.config import RunConfig, dump_config, engine_json
from megalm.config.model import ModelConfig
from megalm.config.rules.completion import complete_model
from megalm.continuation import Progress, ResumePoint, SampleOrder, Stateful, restore
from megalm.data.run_data import RunData
from megalm.data.tokenizers import Tokenizer, open_tokenizer
from megalm.distributed.collectives import gather_json, on_all_ranks
from megalm.distributed.context import RankContext
from megalm.distributed.mesh import Axis
from megalm.distributed.shards import ShardSpec
from megalm.engine.engine import Engine
from megalm.engine.pipeline_gradients import PipelineSpec
from megalm.errors import PlatformError
from megalm.kernels import apex, library
from megalm.kernels.choice import FUSED, REFERENCE, Kernels
from megalm.models.blocks.layers import use_kernels
from megalm.models.dtypes import DTYPES
from megalm.models.gpt.flops import training_flops_per_token
from megalm.models.gpt.model import GPT
from megalm.monitor.logger import MetricLogger
from megalm.monitor.sinks import RunFacts, build_sinks
from megalm.objectives import build_objective
from megalm.parallel.materialize import materialize
from megalm.parallel.pipeline.chunks import TIED, ModelChunks, build_chunks
from megalm.parallel.pipeline.plan import PipelinePlan
from megalm.parallel.pipeline.runner import Pipeline
from megalm.parallel.recompute import apply_recompute
from megalm.parallel.region import TensorParallel
from megalm.resilience.signals import StopRequest


@dataclass
class Run:
    """Everything that the training loop works on."""

    config: RunConfig
    context: RankContext
    data: RunData
    engine: Engine
    metric_logger: MetricLogger
    progress: Progress
    states: list[Stateful]
    """What a checkpoint holds besides tensors."""
    sampler: Sampler | None
    """Continues --sample-prompt."""
    stop: StopRequest
    identity: dict[str, Any]
    """What a checkpoint remembers of the run's inputs, to refuse others on resume."""
    origin: Path | None
    """The checkpoint that the run started from."""
    total_iters: int
    """Optimizer steps of the whole run."""
    started: float
    """When this start began, by the monotonic clock."""
    saved_step: int
    evaluated_step: int = -1

    @property
    def global_batch_size(self) -> int:
        """Samples of one optimizer step."""
        return self.config.batch.global_size(self.data.size)

    @property
    def accumulation(self) -> int:
        """Micro-batches that each rank accumulates in one optimizer step."""
        return self.config.batch.accumulation(self.data.size)


def build_run(config: RunConfig, context: RankContext, stop: StopRequest) -> Run:
    """The parts of the run, in the order in which the data flows, with the checkpoint's state in them."""
    started, device = time.monotonic(), context.device
    tokenizer = on_all_ranks(device, lambda: open_tokenizer(config.tokenizer))
    model = on_all_ranks(device, lambda: complete_model(config, tokenizer.vocab_size if tokenizer else None))
    config = config.model_copy(update={"model": model})
    identity = {"tokenizer": tokenizer.identity if tokenizer else None}
    point = on_all_ranks(device, lambda: ResumePoint.of(config, identity))
    sampler = on_all_ranks(device, lambda: Sampler.of(config, tokenizer))
    progress = Progress()
    order = SampleOrder(progress)
    point.load(progress, order)
    global_batch_size = config.batch.global_size(context.groups.data.size)
    total_iters = config.training.total_iters(global_batch_size, progress.step, progress.consumed_samples)
    data = on_all_ranks(device, lambda: build_data(config, context, tokenizer, order, total_iters))
    order.dataset = data.train
    engine = build_model_and_engine(config, model, context)
    if len(data.train_names) > 1:
        engine.count_by_dataset(len(data.train_names))
    on_all_ranks(device, lambda: restore(engine, config, point))
    return Run(
        config=config,
        context=context,
        data=data,
        engine=engine,
        metric_logger=build_metric_logger(config, context, progress, total_iters),
        progress=progress,
        states=[progress, order, engine.scalars],
        sampler=sampler,
        stop=stop,
        identity=identity,
        origin=point.origin,
        total_iters=total_iters,
        started=started,
        saved_step=progress.step if point.same_run else -1,
    )


def build_data(
    config: RunConfig, context: RankContext, tokenizer: Tokenizer | None, order: SampleOrder, total_iters: int
) -> RunData:
    """The datasets of the run; training samples go on as `order` says."""
    dp, progress = context.groups.data.size, order.progress
    steps = max(0, total_iters - progress.step)
    objective = build_objective(config, tokenizer)
    return RunData.build(
        config,
        tokenizer,
        objective,
        rank=context.dp_rank,
        size=dp,
        pin_memory=context.device.type == "cuda",
        trained_samples=progress.consumed_samples + steps * config.batch.global_size(dp),
        record=order.record,
    )


def build_metric_logger(config: RunConfig, context: RankContext, progress: Progress, total_iters: int) -> MetricLogger:
    """Where the run reports to; the run folder gets the merged configuration too."""
    folder = Path(config.checkpoint.save) if config.checkpoint.save else None
    facts = RunFacts(
        folder=folder,
        resume_step=progress.step,
        resume_samples=progress.consumed_samples,
        total_iters=total_iters,
    )
    is_main = context.rank == 0
    if is_main and folder is not None:
        write_config(folder, dump_config(config))
    logger = MetricLogger(
        build_sinks(config.logging, facts) if is_main else [],
        facts,
        flops_per_token=training_flops_per_token(config.model, config.batch.seq_length),
        ranks=context.mesh.world_size,
    )
    logger.text("config", dump_config(config))
    return logger


def build_model_and_engine(config: RunConfig, model: ModelConfig, context: RankContext) -> Engine:
    """The part of the model that this rank holds, with its initial values, under DeepSpeed."""
    from megalm.engine.build import build_engine  # imports DeepSpeed (2 s): after the data is known to be good

    tensor_parallel = TensorParallel.build(context.groups, model, config.parallel.sequence_parallel)
    plan = PipelinePlan.of(config.parallel, model, config.batch.seq_length)
    rank = context.groups.pipeline.rank
    chunks = build_chunks(plan, rank, model, tensor_parallel)
    shard_specs = whole_model_elsewhere(model)
    kernels = choose_kernels(config, context)
    for chunk, shards in chunks:
        materialize(chunk, shards, config.training.seed, torch.device("cpu"))
        use_kernels(chunk, kernels)
        apply_recompute(chunk, config.recompute)
        shard_specs |= shards.shard_specs
    final_json = engine_json(config, context.mesh.size(Axis.DP))
    settings = (final_json, config.optimizer, config.precision, context.device, context.groups)
    if plan.num_ranks == 1:
        return build_engine(chunks[0][0], *settings, shard_specs, kernels=kernels)
    parts = [chunk for chunk, _ in chunks]
    staged = stage_by_stage(config, model, context, plan, parts)
    return build_engine(ModelChunks(parts), *settings, shard_specs, staged, kernels)


def choose_kernels(config: RunConfig, context: RankContext) -> Kernels:
    """The operators for model and optimizer, the same kind on every rank.

    Raises:
        PlatformError: they cannot be had, or not on every rank; or Apex is asked for and cannot.
    """
    if config.kernels.use_apex:
        on_all_ranks(context.device, lambda: apex.check(context.device.type))
    loaded = on_all_ranks(context.device, lambda: library.load(config.kernels.kernels_backend, context.device.type))
    reasons = gather_json(None if loaded.fused else loaded.reason, context.device)
    without = [rank for rank, reason in enumerate(reasons) if reason is not None]
    if without and len(without) < len(reasons):
        raise PlatformError(
            f"fused kernels load on some ranks and not on rank {without[0]} ({reasons[without[0]]}); make the nodes "
            "alike, or give --kernels-backend reference"
        )
    kernels = FUSED if loaded.fused else REFERENCE
    return apex.with_apex(kernels) if config.kernels.use_apex else kernels


def whole_model_elsewhere(model: ModelConfig) -> dict[str, ShardSpec]:
    """Every parameter of the whole model, as a rank sees it that holds nothing of it."""
    with torch.device("meta"):
        whole = GPT(model, model.vocab_size)
    return {name: ShardSpec.elsewhere(tuple(p.shape)) for name, p in whole.named_parameters()}


def stage_by_stage(
    config: RunConfig, model: ModelConfig, context: RankContext, plan: PipelinePlan, chunks: list[GPT]
) -> PipelineSpec:
    """How the engine runs this rank's stages; every rank calls it."""
    tp, batch = context.mesh.size(Axis.TP), config.batch
    length = batch.seq_length // tp if config.parallel.sequence_parallel else batch.seq_length
    pipeline = Pipeline(
        plan,
        chunks,
        shape=(batch.micro_size, length, model.hidden_size),
        seq_length=batch.seq_length,
        dtype=DTYPES[config.precision.dtype],
        device=context.device,
        group=context.groups.pipeline.group,
        num_micro_batches=batch.accumulation(context.mesh.size(Axis.DP)),
    )
    if not plan.has_copy(model):
        return PipelineSpec(pipeline=pipeline)
    ends = context.groups.subgroup(Axis.PP, plan.ends)
    if ends is None:
        return PipelineSpec(pipeline=pipeline)
    names = dict(chunks[0 if context.groups.pipeline.rank == plan.ends[0] else -1].named_parameters())
    return PipelineSpec(pipeline=pipeline, shared=(names[TIED],), shared_over=ends)
