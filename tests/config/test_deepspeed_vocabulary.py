"""The table of DeepSpeed's keys equals what the installed DeepSpeed reads."""

from enum import Enum
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal, get_args, get_origin

import pytest

from megalm.config.deepspeed.answers import NO_EFFECT_JSON, REMOVED, UNSUPPORTED_JSON
from megalm.config.deepspeed.vocabulary import VOCABULARY


class Recorder(dict):
    """A dictionary that notes the keys that are asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


PLAIN_BLOCKS = ("activation_checkpointing", "flops_profiler", "data_types", "torch_autocast")


@pytest.fixture(scope="module")
def recorded() -> dict[str, set[str]]:
    """The keys that DeepSpeed asks for: of the top level (""), and of the blocks that are no pydantic models."""
    blocks = {name: Recorder() for name in PLAIN_BLOCKS} | {"timers": Recorder()}
    blocks["torch_autocast"] = Recorder(enabled=True, dtype="bf16", lower_precision_safe_modules=[])
    top = Recorder(train_batch_size=1, **blocks)
    deepspeed_config = pytest.importorskip("deepspeed.runtime.config")
    deepspeed_config.DeepSpeedConfig(top)
    return {"": top.asked} | {name: block.asked for name, block in blocks.items()}


ZERO = "deepspeed.runtime.zero"
MODELS = {
    "zero_optimization": f"{ZERO}.config:DeepSpeedZeroConfig",
    "zero_optimization.offload_param": f"{ZERO}.config:DeepSpeedZeroOffloadParamConfig",
    "zero_optimization.offload_optimizer": f"{ZERO}.config:DeepSpeedZeroOffloadOptimizerConfig",
    "zero_optimization.leaf_module": f"{ZERO}.leaf_module_config:DeepSpeedZeroLeafModuleConfig",
    "bf16": "deepspeed.runtime.precision_config:DeepSpeedBF16Config",
    "fp16": "deepspeed.runtime.precision_config:DeepSpeedFP16Config",
    "comms_logger": "deepspeed.comm.config:CommsLoggerConfig",
    "tensorboard": "deepspeed.monitor.config:TensorBoardConfig",
    "csv_monitor": "deepspeed.monitor.config:CSVConfig",
    "wandb": "deepspeed.monitor.config:WandbConfig",
    "timers.throughput": "deepspeed.utils.config:DeepSpeedThroughputTimerConfig",
}
"""DeepSpeed's model of each block, by name: to collect the tests takes no DeepSpeed."""


def block(path: str) -> dict[str, Any]:
    found = VOCABULARY
    for key in path.split("."):
        found = found[key]
    return found


def kind_of(annotation: Any) -> type:
    """The kind in the table that a pydantic annotation stands for."""
    args = [arg for arg in get_args(annotation) if arg is not type(None)]
    origin = get_origin(annotation)
    if origin in (list, dict):
        return origin
    if origin is Literal:
        return str
    if args:
        return kind_of(args[0])
    if issubclass(annotation, Enum):
        return int if issubclass(annotation, int) else str
    if annotation in (bool, int, float, str, list):
        return annotation
    return str if issubclass(annotation, Path) else dict


# Read elsewhere than in DeepSpeedConfig, or only where another key is set.
READ_ELSEWHERE = {"sequence_parallel_size", "data_parallel_size", "weight_quantization", "bfloat16"}


def test_top_level_keys_equal_what_deepspeed_asks_for(recorded):
    asked = {key for key in recorded[""] if not key.startswith("_")} - set(REMOVED)
    assert asked - set(VOCABULARY) == set()
    assert set(VOCABULARY) - asked - READ_ELSEWHERE == set()


def test_keys_of_plain_blocks_equal_what_deepspeed_asks_for(recorded):
    for name in PLAIN_BLOCKS:
        assert recorded[name] == set(block(name)), name
    assert recorded["timers"] == set(block("timers"))


@pytest.mark.parametrize("path", sorted(MODELS))
def test_keys_and_types_of_blocks_equal_deepspeeds_models(path):
    fields = resolve_name(MODELS[path]).model_fields
    expected = {name: kind_of(info.annotation) for name, info in fields.items()}
    expected |= {info.alias: kind_of(info.annotation) for info in fields.values() if info.alias}
    assert {name: dict if isinstance(kind, dict) else kind for name, kind in block(path).items()} == expected


def test_removed_keys_equal_deepspeeds(recorded):
    deepspeed_config = pytest.importorskip("deepspeed.runtime.config")
    zero = {f"zero_optimization.{key}" for key in deepspeed_config._REMOVED_ZERO_CONFIG_KEYS}
    assert set(REMOVED) == set(deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS) | zero


def test_unsupported_keys_are_in_the_vocabulary():
    for path in UNSUPPORTED_JSON:
        *above, key = path.split(".")
        assert key in (block(".".join(above)) if above else VOCABULARY), path


def test_blocks_that_are_not_looked_into_are_refused():
    free = [path for path, kind in VOCABULARY.items() if kind is dict]
    assert [path for path in free if path not in UNSUPPORTED_JSON | NO_EFFECT_JSON and path != "bfloat16"] == []
