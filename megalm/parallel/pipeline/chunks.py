"""The stages that a pipeline rank holds of a model, on the meta device, as modules with the whole model's names."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from megalm.config.model import ModelConfig
from megalm.models.gpt.model import GPT
from megalm.parallel.apply import parallelize
from megalm.parallel.pipeline.plan import PipelinePlan
from megalm.parallel.region import TensorParallel
from megalm.parallel.styles import Shards

TIED = "embedding.tokens.weight"


def build_chunks(
    plan: PipelinePlan, rank: int, model: ModelConfig, tensor_parallel: TensorParallel
) -> list[tuple[GPT, Shards]]:
    """The stages of pipeline rank `rank`, on the meta device, and what they hold of the whole model.

    Parameters have the whole model's names. With tied weights the first and the last stage need the token embedding:
    on one rank they use the same, on two the last one's is a copy that does not count.
    """
    last = len(plan.layers) - 1
    rows = model.padded_vocab_size(tensor_parallel.size)
    chunks = []
    for stage in plan.stages(rank):
        ends = {"has_embedding": stage == 0, "has_head": stage == last}
        with torch.device("meta"):
            chunk = GPT(model, rows, layers=plan.layers[stage], **ends)
        chunks.append((chunk, parallelize(chunk, tensor_parallel)))
    if model.tied and rank == plan.ends[1] and last > 0:
        chunk, shards = chunks[-1]
        if plan.has_copy(model):
            shards.shard_specs[TIED] = replace(shards.shard_specs[TIED], is_owner=False)
        else:
            chunk.embedding.tokens = chunks[0][0].embedding.tokens
    return chunks


class ModelChunks(nn.ModuleList):
    """The stages of one rank as one module, whose parameters keep the names of the whole model."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any module, without the number of the stage in front."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield name.partition(".")[2], parameter
