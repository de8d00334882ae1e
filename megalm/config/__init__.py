"""The configuration of a run: defaults < recipes (YAML) < flags, cross-checked with the DeepSpeed JSON.

Where to add
* a setting: a field with its help text in a section (model.py, training.py, data.py, parallel.py, output.py); the
  flag, recipe key, dump and reference follow.
* a section: its class in sections.py.
* a peer's other name for a setting, a flag that is not supported: the tables in merging/names.py; a flag without
  effect: merging/nothing.py.
* a length (a run's, a schedule's): lengths.py, which turns every unit into samples; its rules in rules/schedule.py.
* another trainer's configuration: a file in translation/.
* a rule between settings: a function in rules/run.py, and its name in `CHECKS`; of the layout: rules/layout.py.
* a key of DeepSpeed's JSON: its type in deepspeed/vocabulary.py, what is done about it in deepspeed/answers.py; one
  that says what a setting says: `deepspeed.read.FACTS`.
* what DeepSpeed is given: deepspeed/write.py.
"""

from megalm.config.data import DataConfig, TokenizerConfig
from megalm.config.deepspeed.write import engine_json, offloads_optimizer, zero_stage
from megalm.config.extensions import ExtensionsConfig
from megalm.config.kernels import KernelsConfig
from megalm.config.merging.dump import dump_config
from megalm.config.merging.flags import build_parser
from megalm.config.merging.load import Loaded, load, load_config
from megalm.config.merging.reference import reference_markdown
from megalm.config.model import ModelConfig
from megalm.config.output import CheckpointConfig, LoggingConfig
from megalm.config.parallel import EngineConfig, ParallelConfig
from megalm.config.recompute import RecomputeConfig
from megalm.config.rules.batch import with_micro_batch_size
from megalm.config.rules.layout import check_layout, layout_problems
from megalm.config.rules.loss import cross_entropy_impl, logits_bytes
from megalm.config.rules.run import run_problems
from megalm.config.sections import RunConfig
from megalm.config.training import BatchConfig, OptimizerConfig, PrecisionConfig, TrainingConfig

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "DataConfig",
    "EngineConfig",
    "ExtensionsConfig",
    "KernelsConfig",
    "Loaded",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "RecomputeConfig",
    "RunConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "build_parser",
    "check_layout",
    "cross_entropy_impl",
    "dump_config",
    "engine_json",
    "layout_problems",
    "load",
    "load_config",
    "logits_bytes",
    "offloads_optimizer",
    "reference_markdown",
    "run_problems",
    "with_micro_batch_size",
    "zero_stage",
]
