"""A run in, its YAML out."""

import json
import sys
from typing import Any

import yaml

from megalm.config.deepspeed.write import engine_json
from megalm.config.merging.recipe import RecipeDumper
from megalm.config.sections import RunConfig


def dump_config(config: RunConfig) -> str:
    """The run as a recipe; `load_config(["--config", FILE])` gives an equal one, without commands to this start."""
    return _yaml(config.kept())


def render_sources(config: RunConfig, sources: dict[str, str]) -> str:
    """As `dump_config`, with a comment after each value that was given, and what DeepSpeed will get at the end."""
    lines = []
    for section, content in _plain(config).items():
        lines.append(f"{section}:")
        for name, value in content.items():
            first, *rest = _yaml({name: value}).splitlines()
            one_line = isinstance(value, (dict, list)) or not rest
            lines.append(f"  {first}" + (f"  # {sources[name]}" if name in sources and one_line else ""))
            lines += [f"  {line}" for line in rest]
    lines.append('# DeepSpeed gets ("auto": follows from the number of ranks):')
    lines += [f"# {line}" for line in json.dumps(_without_ranks(config), indent=2).splitlines()]
    return "\n".join(lines) + "\n"


def _without_ranks(config: RunConfig) -> dict[str, Any]:
    """The DeepSpeed configuration with "auto" where it depends on the number of ranks."""
    merged = engine_json(config, 1)
    if config.batch.global_batch_size is None:
        merged["train_batch_size"] = "auto"
    elif config.batch.gradient_accumulation_steps is None:
        merged["gradient_accumulation_steps"] = "auto"
    if config.batch.micro_batch_size is None:
        merged["train_micro_batch_size_per_gpu"] = "auto"
    return merged


def _yaml(content: dict[str, Any]) -> str:
    return yaml.dump(content, Dumper=RecipeDumper, sort_keys=False, allow_unicode=False, width=sys.maxsize)


def _plain(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")
