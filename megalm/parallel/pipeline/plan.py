"""Who holds which layers, for the whole pipeline: a pure value."""

from dataclasses import dataclass

from megalm.config.model import ModelConfig
from megalm.config.parallel import ParallelConfig, PipelineSchedule
from megalm.config.rules.pipeline import layout_counts, num_stages, schedule_name
from megalm.models.families import FAMILIES
from megalm.parallel.pipeline.partition import balanced_layers, layer_ranges, rank_of_stage, stages_of_rank


@dataclass(frozen=True, kw_only=True)
class PipelinePlan:
    """Who holds which layers, for the whole pipeline. A pure value."""

    schedule: PipelineSchedule
    num_ranks: int
    layers: tuple[range, ...]
    """Layers of each stage."""
    shared: tuple[str, ...] = ()
    """Parameters that the first and the last stage both use."""

    @classmethod
    def of(cls, parallel: ParallelConfig, model: ModelConfig, seq_length: int) -> "PipelinePlan":
        """The plan that the settings describe; they have been found possible."""
        family, counts = FAMILIES[model.model_family], layout_counts(parallel)
        if counts is not None:
            layers = layer_ranges(counts)
        else:
            costs = family.part_costs(model, seq_length, parallel.pipeline_partition)
            layers = balanced_layers(model.total_layers, num_stages(parallel, model.total_layers), costs)
        ranks = parallel.pipeline_model_parallel_size
        shared = family.shared_parameters(model)
        return cls(schedule=schedule_name(parallel), num_ranks=ranks, layers=tuple(layers), shared=shared)

    def stages(self, rank: int) -> list[int]:
        """The stages of one pipeline rank."""
        return stages_of_rank(self.schedule, rank, self.num_ranks, len(self.layers))

    @property
    def ends(self) -> tuple[int, int]:
        """The pipeline ranks of the first and of the last stage."""
        return 0, rank_of_stage(self.schedule, len(self.layers) - 1, self.num_ranks)

    @property
    def copied(self) -> tuple[str, ...]:
        """The shared parameters of which the last stage has a copy, because another rank has the first stage."""
        return self.shared if self.ends[0] != self.ends[1] else ()

    def __str__(self) -> str:
        return ", ".join(
            f"rank {rank}: " + " + ".join(self._describe(stage) for stage in self.stages(rank))
            for rank in range(self.num_ranks)
        )

    def _describe(self, stage: int) -> str:
        numbers = self.layers[stage]
        parts = ["embedding"] if stage == 0 else []
        if len(numbers):
            parts.append(f"layers {numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else f"layer {numbers[0]}")
        return ", ".join([*parts, "head"] if stage == len(self.layers) - 1 else parts)
