"""Who holds what: the rank grid, the stages of the pipeline, and each stage's share of the model."""

from dataclasses import dataclass
from functools import cached_property

import torch

from megalm.assembly import mesh_of
from megalm.config import RunConfig
from megalm.config.model import ModelConfig
from megalm.dist.mesh import Mesh
from megalm.models.gpt import GPT
from megalm.parallel.partition import PartCosts
from megalm.parallel.pipeline import PipelinePlan
from megalm.planner.activations import Part


@dataclass(frozen=True)
class Layout:
    """A run's layout on a number of ranks."""

    config: RunConfig
    mesh: Mesh

    @classmethod
    def of(cls, config: RunConfig, world_size: int) -> "Layout":
        """The layout; `check_layout` has found it possible."""
        return cls(config, mesh_of(config, world_size))

    @cached_property
    def pipeline(self) -> PipelinePlan:
        """The stages and their layers."""
        return PipelinePlan.of(self.config.parallel, self.config.model, self.config.batch.seq_length)

    @property
    def chunks(self) -> int:
        """Stages of each pipeline rank."""
        return len(self.pipeline.layers) // self.mesh.pp

    @property
    def stage_ranks(self) -> list[int]:
        """The pipeline rank of each stage."""
        ranks = range(self.mesh.pp)
        owner = {stage: rank for rank in ranks for stage in self.pipeline.stages(rank)}
        return [owner[stage] for stage in range(len(self.pipeline.layers))]

    @property
    def rows(self) -> int:
        """Rows of the vocabulary tables of one rank."""
        return self.config.model.padded_vocab_size(self.mesh.tp) // self.mesh.tp

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step on each data-parallel rank."""
        return self.config.batch.accumulation(self.mesh.dp)

    def stage_costs(self) -> list[float]:
        """Operations of each stage relative to their mean, output head counted."""
        costs = PartCosts.of_model(self.config.model, self.config.batch.seq_length, "flops")
        of_stages = costs.of_stages(self.pipeline.layers)
        return [cost * len(of_stages) / sum(of_stages) for cost in of_stages]

    def part(self, pp_rank: int) -> Part:
        """What a rank of one pipeline rank holds, as a model of its own size."""
        stages = self.pipeline.stages(pp_rank)
        layers = tuple(number for stage in stages for number in self.pipeline.layers[stage])
        return Part(
            model=self._share_of_layers(),
            rows=self.rows,
            layers=layers,
            has_embedding=0 in stages,
            has_head=len(self.pipeline.layers) - 1 in stages,
        )

    def _share_of_layers(self) -> ModelConfig:
        """The model with a tensor-parallel rank's share of heads and feed-forward channels; norms are whole."""
        model, tp = self.config.model, self.mesh.tp
        return model.model_copy(
            update={
                "num_attention_heads": model.num_attention_heads // tp,
                "num_query_groups": max(1, model.num_kv_heads // tp),
                "kv_channels": model.head_dim,
                "ffn_hidden_size": model.ffn_size // tp,
                "vocab_size": min(self.rows, model.vocab_size or self.rows),
            }
        )


def parameters(part: Part) -> int:
    """Parameters of a rank that holds `part`."""
    with torch.device("meta"):
        model = GPT(part.model, part.rows, layers=part.layers, has_embedding=part.has_embedding, has_head=part.has_head)
    return sum(parameter.numel() for parameter in model.parameters())
