"""A command line in, one checked `RunConfig` out: defaults < recipes < flags, joined with the DeepSpeed JSON.

Every problem found on the way is kept and all are raised together, before anything else of megalm starts.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megalm.config.base import Section
from megalm.config.deepspeed.read import (
    DeepSpeedJson,
    check_json,
    facts,
    read_deepspeed_json,
    remainder,
)
from megalm.config.deepspeed.write import DEFAULT_ZERO_STAGE
from megalm.config.merging.dump import render_sources
from megalm.config.merging.flags import Flags, build_parser, parse_flags
from megalm.config.merging.recipe import KeyPath, Recipe, read_recipe
from megalm.config.merging.settings import SECTIONS, SETTINGS, Given
from megalm.config.rules.batch import with_micro_batch_size
from megalm.config.rules.layout import check_layout, impossible_layout
from megalm.config.rules.run import run_problems
from megalm.config.sections import RunConfig
from megalm.errors import ConfigError, LayoutError

DEFAULT = "default"
"""The source of a value that nobody gave."""


@dataclass(frozen=True)
class Loaded:
    """A checked run, where each value came from that is not a default, and what to say at the start."""

    config: RunConfig
    sources: dict[str, str]
    notes: list[str]

    def on_ranks(self, world_size: int) -> RunConfig:
        """The run on so many ranks, with its micro-batch size.

        Raises:
            LayoutError: every problem, each with where its values come from.
        """
        try:
            return with_micro_batch_size(self.config, check_layout(self.config, world_size))
        except LayoutError as error:
            given = {name: Given(None, source) for name, source in self.sources.items()}
            raise LayoutError([with_sources(problem, given) for problem in error.problems]) from None


@dataclass
class Merge:
    """The values merged so far, by field name, and the problems met so far."""

    given: dict[str, Given] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    """Fields whose value did not fit their type, which has been said: their sections cannot be judged."""


def load_config(argv: Sequence[str], prog: str | None = None) -> RunConfig:
    """The checked run that a command line describes. `--help` and `--print-config` print and exit with 0.

    Raises:
        ConfigError: holds every problem of flags, recipes, DeepSpeed JSON and their combination.
    """
    return load(argv, prog).config


def load(argv: Sequence[str], prog: str | None = None) -> Loaded:
    """As `load_config`, with the source of each value."""
    flags = parse_flags(argv, build_parser(prog))
    recipes = [read_recipe(path) for path in flags.recipes]
    lost = [problem for recipe in recipes if recipe.problems and not recipe.given for problem in recipe.problems]
    if lost:  # without the recipe everything seems to be missing
        raise ConfigError(flags.problems + lost)
    merge = merge_sources(flags, recipes)
    config = build_run(merge)
    if config is not None:
        merge.problems += [with_sources(problem, merge.given) for problem in run_problems(config)]
    if merge.problems or config is None:
        raise ConfigError(list(dict.fromkeys(merge.problems)))
    sources = {name: given.source for name, given in merge.given.items() if given.source != DEFAULT}
    if flags.print_config:
        if impossible := impossible_layout(config):
            raise LayoutError([with_sources(problem, merge.given) for problem in impossible])
        sys.stdout.write(render_sources(config, sources))
        raise SystemExit(0)
    notes = [note for recipe in recipes for note in recipe.notes]
    return Loaded(config, sources, flags.notes + notes)


def merge_sources(flags: Flags, recipes: list[Recipe]) -> Merge:
    """Flags over recipes over each other, then the DeepSpeed JSON beside them."""
    merge = Merge(problems=list(flags.problems))
    lines: dict[KeyPath, int] = {}
    for recipe in recipes:
        merge.problems += recipe.problems
        merge.given |= recipe.given
        if "deepspeed_config" in recipe.given:
            lines = recipe.lines
    merge.given |= flags.given
    merge.given = {name: given for name, given in merge.given.items() if given.value is not None}
    for name in flags.needs:
        if name not in merge.given:
            merge.problems.append(f"{name} is missing; give {SETTINGS[name].flag} {SETTINGS[name].metavar}")
    convert_all(merge)
    tell_tokenizer_vocab_size(merge.given)
    document = find_json(merge, lines)
    if document is not None:
        join_json(merge, document)
    if "zero_stage" not in merge.given:
        merge.given["zero_stage"] = Given(DEFAULT_ZERO_STAGE, DEFAULT)
    return merge


def find_json(merge: Merge, recipe_lines: dict[KeyPath, int]) -> DeepSpeedJson | None:
    """The DeepSpeed JSON of the run: a file, or the block inside a recipe."""
    given = merge.given.get("deepspeed_config")
    if given is None:
        return None
    if isinstance(given.value, dict):
        above = ("engine", "deepspeed_config")
        lines = {path[2:]: line for path, line in recipe_lines.items() if path[:2] == above and len(path) > 2}
        return DeepSpeedJson(given.source.rpartition(":")[0], given.value, lines)
    return read_deepspeed_json(given.value) if given.value is not None else None


def convert_all(merge: Merge) -> None:
    """Each value as its field's type; one that does not fit is a problem and is taken out."""
    for name, given in list(merge.given.items()):
        try:
            merge.given[name] = Given(SETTINGS[name].convert(given.value), given.source)
        except ValueError as error:
            shown = " ".join(map(str, given.value)) if isinstance(given.value, list) else given.value
            merge.problems.append(f"{name}={shown} ({given.source}) {error}")
            merge.given[name] = Given(None, given.source)
            merge.broken.add(name)


def tell_tokenizer_vocab_size(given: dict[str, Given]) -> None:
    """Lets vocab_size give the number of ids of a tokenizer whose files do not tell it, as Megatron means it."""
    kind = given.get("tokenizer_type", Given(None, DEFAULT)).value
    if kind not in ("NullTokenizer", "TikTokenizer") or "vocab_size" not in given or "tokenizer_vocab_size" in given:
        return
    given["tokenizer_vocab_size"] = given["vocab_size"]
    if kind == "NullTokenizer":
        del given["vocab_size"]  # the model's is one more, for the end of document


def join_json(merge: Merge, document: DeepSpeedJson) -> None:
    """The JSON's facts fill what nobody else gave and must agree with what somebody did."""
    check_json(document)
    merge.problems += document.problems
    for name, given, shown in facts(document):
        try:
            value = SETTINGS[name].convert(given.value)
        except ValueError as error:
            merge.problems.append(f"{given.source}: {shown}: {name} {error}")
            continue
        other = merge.given.setdefault(name, Given(value, given.source))
        if other.value != value and other.value is not None:
            merge.problems.append(
                f"{name}={other.value} ({other.source}) but {shown} ({given.source}); "
                'say it once, or write "auto" in the DeepSpeed JSON'
            )
    content = remainder(document)
    merge.given["deepspeed_config"] = Given(content or None, merge.given["deepspeed_config"].source)


def build_run(merge: Merge) -> RunConfig | None:
    """The sections of the merged values; None if one cannot be built, after asking the others for their problems."""
    built: dict[str, Section] = {}
    for section, cls in SECTIONS.items():
        values: dict[str, Any] = {}
        broken = False
        for name, setting in SETTINGS.items():
            if setting.section != section:
                continue
            given = merge.given.get(name)
            if name in merge.broken:
                broken = True
            elif given is not None and given.value is not None:
                values[name] = given.value
            elif setting.required:
                broken = True
                if given is None:
                    merge.problems.append(
                        f"{name} is missing; give {setting.flag} {setting.metavar}, or {name} under {section}: "
                        "in a recipe"
                    )
        if not broken:
            built[section] = cls(**values)
    if len(built) == len(SECTIONS):
        return RunConfig.model_validate(built)
    for part in built.values():
        if hasattr(part, "problems"):
            merge.problems += [with_sources(problem, merge.given) for problem in part.problems()]
    return None


def with_sources(problem: str, given: dict[str, Given]) -> str:
    """The problem, followed by where the values in it (name=value) were given."""
    names = dict.fromkeys(re.findall(r"\b([a-z][a-z0-9_]*)=", problem))
    sources = [f"{name}: {given[name].source}" for name in names if name in given and given[name].source != DEFAULT]
    return f"{problem} ({', '.join(sources)})" if sources else problem
