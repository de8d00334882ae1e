"""What a rank holds of a model, built: cut on the meta device, filled, with its operators and its recomputation."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from megalm.config.model import ModelConfig
from megalm.config.rules.loss import cross_entropy_impl
from megalm.config.sections import RunConfig
from megalm.distributed.context import RankContext
from megalm.distributed.shards import ShardSpec
from megalm.kernels.backend import Kernels
from megalm.models.blocks.head import use_linear_loss
from megalm.models.blocks.operators import use_kernels
from megalm.models.dtypes import DTYPES
from megalm.models.families import FAMILIES
from megalm.parallel.apply import parallelize
from megalm.parallel.materialize import materialize
from megalm.parallel.pipeline.chunks import ModelChunks, build_chunks
from megalm.parallel.pipeline.plan import PipelinePlan
from megalm.parallel.recompute import apply_recompute
from megalm.parallel.region import TensorParallel

if TYPE_CHECKING:
    from megalm.parallel.pipeline.runner import PipelineSpec


@dataclass(frozen=True, kw_only=True)
class RankModel:
    """What a rank holds of a model."""

    module: nn.Module
    """The whole model, or this rank's stages of a pipeline."""
    shard_specs: dict[str, ShardSpec]
    """Of every parameter of the whole model, by name: which part of it is here."""
    pipeline: "PipelineSpec | None" = None


def build_rank_model(config: RunConfig, model: ModelConfig, context: RankContext, kernels: Kernels) -> RankModel:
    """This rank's part of the model, with its initial values, on the CPU; every rank calls it."""
    tensor_parallel = TensorParallel.build(context.groups, model, config.parallel.sequence_parallel)
    plan = PipelinePlan.of(config.parallel, model, config.batch.seq_length)
    chunks = build_chunks(plan, context.groups.pipeline.rank, model, tensor_parallel)
    shard_specs = whole_model_elsewhere(model)
    for chunk, shards in chunks:
        materialize(chunk, shards, config.training.seed, torch.device("cpu"))
        use_kernels(chunk, kernels)
        if cross_entropy_impl(config) == "linear":
            use_linear_loss(chunk)
        apply_recompute(chunk, config.recompute)
        shard_specs |= shards.shard_specs
    parts = [chunk for chunk, _ in chunks]
    if plan.num_ranks == 1:
        return RankModel(module=parts[0], shard_specs=shard_specs)
    from megalm.parallel.pipeline.runner import PipelineSpec  # torch's pipelines load its compiler, for seconds

    pipeline = PipelineSpec.of(config, context, plan, parts)
    return RankModel(module=ModelChunks(parts), shard_specs=shard_specs, pipeline=pipeline)


def build_frozen_model(config: RunConfig, model: ModelConfig, context: RankContext, kernels: Kernels) -> RankModel:
    """A whole model of which nothing is trained, cut as the run's is, on the rank's device; its weights are to be set.

    Every rank calls it.
    """
    tensor_parallel = TensorParallel.build(context.groups, model, config.parallel.sequence_parallel)
    with torch.device("meta"):
        module = FAMILIES[model.model_family].build(model, model.padded_vocab_size(tensor_parallel.size))
    shards = parallelize(module, tensor_parallel)
    module.to(DTYPES[config.precision.dtype]).to_empty(device=context.device)
    use_kernels(module, kernels)
    return RankModel(module=module.requires_grad_(False).eval(), shard_specs=shards.shard_specs)


def whole_model_elsewhere(model: ModelConfig) -> dict[str, ShardSpec]:
    """Every parameter of the whole model, as a rank sees it that holds nothing of it."""
    with torch.device("meta"):
        whole = FAMILIES[model.model_family].build(model, model.vocab_size)
    return {name: ShardSpec.elsewhere(tuple(p.shape)) for name, p in whole.named_parameters()}
