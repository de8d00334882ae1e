"""The whole run configuration: every section under its name in a recipe."""

from megalm.config.base import Section
from megalm.config.data import DataConfig, TokenizerConfig
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
