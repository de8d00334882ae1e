"""The stages that a pipeline rank holds of a model, on the meta device, as modules with the whole model's names."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from megalm.config.model import ModelConfig
from megalm.models.contract import LanguageModel
from megalm.models.families import FAMILIES
from megalm.parallel.apply import parallelize
from megalm.parallel.pipeline.plan import PipelinePlan
from megalm.parallel.region import TensorParallel
from megalm.parallel.styles import Shards


def build_chunks(
    plan: PipelinePlan, rank: int, model: ModelConfig, tensor_parallel: TensorParallel
) -> list[tuple[LanguageModel, Shards]]:
    """The stages of pipeline rank `rank`, on the meta device, and what they hold of the whole model.

    Parameters have the whole model's names. What the first and the last stage share, they use together on one rank; on
    two, the last one's is a copy that this rank does not own.
    """
    last = len(plan.layers) - 1
    rows = model.padded_vocab_size(tensor_parallel.size)
    build = FAMILIES[model.model_family].build
    chunks = []
    for stage in plan.stages(rank):
        with torch.device("meta"):
            ends = {"has_embedding": stage == 0, "has_head": stage == last}
            chunk = build(model, rows, layers=plan.layers[stage], **ends)
        chunks.append((chunk, parallelize(chunk, tensor_parallel)))
    if rank == plan.ends[1] and last > 0:
        chunk, shards = chunks[-1]
        for name in plan.shared:
            if name in plan.copied:
                shards.shard_specs[name] = replace(shards.shard_specs[name], is_owner=False)
            else:
                owner = name.rpartition(".")[0]
                chunk.set_submodule(owner, chunks[0][0].get_submodule(owner), strict=True)
    return chunks


class ModelChunks(nn.ModuleList):
    """The stages of one rank as one module, whose parameters keep the names of the whole model."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any module, without the number of the stage in front."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield name.partition(".")[2], parameter
