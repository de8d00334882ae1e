"""The parts of a run, built from its configuration in the order in which the data flows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from megalm.checkpoint.run_folder import lock_run_folder, prepare_run_folder, set_aside
from megalm.config import RunConfig, engine_json
from megalm.config.model import ModelConfig
from megalm.continuation import SampleOrder
from megalm.data.loader import MicroBatchIterator, Transform, build_loader
from megalm.data.samples.blended_dataset import BlendedDataset
from megalm.data.samples.build import build_datasets
from megalm.data.samples.gpt_dataset import SampleDataset
from megalm.data.tokenizers import Tokenizer
from megalm.distributed.collectives import gather_json, on_all_ranks
from megalm.distributed.context import RankContext
from megalm.distributed.mesh import Axis
from megalm.distributed.shards import ShardSpec
from megalm.engine.engine import Engine
from megalm.engine.pipeline_gradients import PipelineSpec
from megalm.errors import DataError, PlatformError
from megalm.kernels import apex, library
from megalm.kernels.choice import FUSED, REFERENCE, Kernels
from megalm.models.blocks.layers import use_kernels
from megalm.models.dtypes import DTYPES
from megalm.models.gpt.model import GPT
from megalm.objectives.causal import CausalObjective
from megalm.parallel.materialize import materialize
from megalm.parallel.pipeline.chunks import TIED, ModelChunks, build_chunks
from megalm.parallel.pipeline.plan import PipelinePlan
from megalm.parallel.pipeline.runner import Pipeline
from megalm.parallel.recompute import apply_recompute
from megalm.parallel.region import TensorParallel


@dataclass(frozen=True)
class Data:
    """The datasets of a run (None: not used) and the objective that turns a sample into a batch row."""

    train: SampleDataset | None
    valid: dict[str, SampleDataset]
    """Validation sets by name; "" for the only one."""
    test: SampleDataset | None
    objective: Transform
    train_names: tuple[str, ...] = ()
    """Names of the datasets that the training samples come from."""


def build_data(
    config: RunConfig, model: ModelConfig, tokenizer: Tokenizer | None, global_batch_size: int, order: SampleOrder
) -> Data:
    """The datasets, each with as many samples as the run draws from it; training samples go on as `order` says."""
    training, progress = config.training, order.progress
    assert model.vocab_size is not None
    evaluated = training.eval_iters * global_batch_size
    steps = training.total_iters(global_batch_size, progress.step, progress.consumed_samples) - progress.step
    trained = progress.consumed_samples + max(0, steps) * global_batch_size
    built = build_datasets(
        config.data,
        seq_length=config.batch.seq_length,
        num_samples=(
            0 if training.skip_train else trained,
            None if config.data.full_validation and evaluated else evaluated,
            evaluated,
        ),
        seed=training.seed,
        vocab_size=model.vocab_size,
        tokenizer_identity=tokenizer.identity if tokenizer else None,
        record=order.record,
    )
    if isinstance(built.train, BlendedDataset) and built.train.samples_per_epoch < global_batch_size:
        raise DataError(
            f"the training data has {built.train.samples_per_epoch} samples of {config.batch.seq_length} tokens in one "
            f"epoch, less than one global batch of {global_batch_size}; give more data, or a smaller "
            "--global-batch-size or --seq-length"
        )
    objective = CausalObjective(
        eod=tokenizer.eod if tokenizer else None,
        eod_mask_loss=config.data.eod_mask_loss,
        reset_position_ids=config.data.reset_position_ids,
        reset_attention_mask=config.data.reset_attention_mask,
    )
    return Data(built.train, built.valid, built.test, objective, built.train_names)


def loader(
    config: RunConfig, data: Data, dataset: SampleDataset, context: RankContext, start: int, stop: int, workers: int
) -> MicroBatchIterator:
    """This rank's micro-batches of samples start..stop."""
    dp = context.mesh.size(Axis.DP)
    blended = isinstance(dataset, BlendedDataset) and dataset.num_datasets > 1 and dataset is data.train
    return build_loader(
        dataset,
        data.objective,
        micro_batch_size=config.batch.micro_size,
        global_batch_size=config.batch.global_size(dp),
        start_sample=start,
        stop_sample=stop,
        rank=context.dp_rank,
        size=dp,
        num_workers=workers,
        pin_memory=context.device.type == "cuda",
        dataset_of=data.train.dataset_of if blended and isinstance(data.train, BlendedDataset) else None,
    )


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


def run_folder(config: RunConfig) -> Path | None:
    """The folder of --save."""
    return Path(config.checkpoint.save) if config.checkpoint.save else None


def open_run_folder(config: RunConfig, context: RankContext) -> TextIO | None:
    """Make, probe and lock the run folder (rank 0 holds it while the returned file is open).

    With --fresh an earlier run's files are set aside.
    """
    folder = run_folder(config)
    if folder is None:
        return None
    on_all_ranks(context.device, lambda: prepare_run_folder(folder))
    lock = on_all_ranks(context.device, lambda: lock_run_folder(folder) if context.rank == 0 else None)
    if config.checkpoint.fresh:
        on_all_ranks(context.device, lambda: set_aside(folder) if context.rank == 0 else None)
    return lock


ON_HOST = frozenset({"cu_seqlens"})
"""Parts of a batch that the model reads on the host, where a copy on the device would make it wait."""


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The batch on `device`, but for what stays on the host."""
    return {name: tensor if name in ON_HOST else tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def identity(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What a checkpoint remembers of the run's inputs, to refuse others on resume (the data: see `SampleOrder`)."""
    return {"tokenizer": tokenizer.identity if tokenizer else None}
