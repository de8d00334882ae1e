"""The configuration of a run: defaults < recipes (YAML) < flags, cross-checked with the DeepSpeed JSON.

Where to add
* a setting: a field with its help text in a section (model.py, training.py, data.py, parallel.py, output.py); the
  flag, recipe key, dump and reference follow. If it must not change on resume, see `dump.RESUME_FIELDS`.
* a section: its class in sections.py.
* a peer's other name for a setting, a flag without effect, a flag that is not supported: the tables in names.py.
* a rule between settings: a function in checks.py, and its name in `CHECKS`.
* a key of DeepSpeed's JSON: deepspeed_vocabulary.py; one that says what a setting says: `deepspeed_json.FACTS`.
* what DeepSpeed is given: engine_json.py.
"""

from megalm.config.checks import check_layout, layout_problems, run_problems
from megalm.config.data import DataConfig, TokenizerConfig
from megalm.config.dump import config_hash, dump_config
from megalm.config.engine_json import engine_json, offloads_optimizer, zero_stage
from megalm.config.flags import build_parser
from megalm.config.load import Loaded, load, load_config
from megalm.config.micro_batch import with_micro_batch_size
from megalm.config.model import ModelConfig
from megalm.config.output import CheckpointConfig, LoggingConfig
from megalm.config.parallel import EngineConfig, ParallelConfig
from megalm.config.recompute import RecomputeConfig
from megalm.config.reference import reference_markdown
from megalm.config.sections import RunConfig
from megalm.config.training import BatchConfig, OptimizerConfig, PrecisionConfig, TrainingConfig

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "DataConfig",
    "EngineConfig",
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
    "config_hash",
    "dump_config",
    "engine_json",
    "layout_problems",
    "load",
    "load_config",
    "offloads_optimizer",
    "reference_markdown",
    "run_problems",
    "with_micro_batch_size",
    "zero_stage",
]
