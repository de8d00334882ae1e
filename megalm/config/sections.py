"""The whole run configuration: every section under its name in a recipe."""

from typing import Any

from megalm.config.base import MayDiffer, OneShot, Section
from megalm.config.data import DataConfig, TokenizerConfig
from megalm.config.distillation import DistillationConfig
from megalm.config.extensions import ExtensionsConfig
from megalm.config.kernels import KernelsConfig
from megalm.config.model import ModelConfig
from megalm.config.output import CheckpointConfig, LoggingConfig
from megalm.config.parallel import EngineConfig, ParallelConfig
from megalm.config.recompute import RecomputeConfig
from megalm.config.training import BatchConfig, OptimizerConfig, PrecisionConfig, TrainingConfig


class RunConfig(Section):
    """One checked run. `load_config` builds it from recipe, flags and DeepSpeed JSON."""

    model: ModelConfig
    batch: BatchConfig
    training: TrainingConfig
    distillation: DistillationConfig = DistillationConfig()
    optimizer: OptimizerConfig
    precision: PrecisionConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    parallel: ParallelConfig
    recompute: RecomputeConfig
    kernels: KernelsConfig
    engine: EngineConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    extensions: ExtensionsConfig

    def eval_sizes(self, data_parallel_size: int) -> tuple[int, int]:
        """Samples of one micro-batch and of one global batch of an evaluation."""
        micro, size = self.training.eval_micro_batch_size, self.training.eval_global_batch_size
        return micro or self.batch.micro_size, size or self.batch.global_size(data_parallel_size)

    def kept(self) -> dict[str, dict[str, Any]]:
        """What a run remembers of its settings, as JSON holds it: all but the commands to one start (`OneShot`)."""
        return self._without(OneShot)

    def agreed(self) -> dict[str, dict[str, Any]]:
        """What all ranks must have in common: all but what each may have for itself (`MayDiffer`)."""
        return self._without(MayDiffer)

    def _without(self, mark: type) -> dict[str, dict[str, Any]]:
        sections: dict[str, dict[str, Any]] = self.model_dump(mode="json")
        for name, values in sections.items():
            for field in getattr(self, name).marked(mark):
                del values[field]
        return sections
