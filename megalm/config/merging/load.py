"""A command line in, one checked `RunConfig` out: defaults < recipes < flags, joined with the DeepSpeed JSON.

Every problem found on the way is kept and all are raised together, before anything else of megalm starts.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from megalm.config.base import Section
from megalm.config.deepspeed.check import check_engine_keys, check_json
from megalm.config.deepspeed.read import DeepSpeedJson, facts, read_deepspeed_json, remainder
from megalm.config.deepspeed.write import DEFAULT_ZERO_STAGE
from megalm.config.hugging_face import read_folder
from megalm.config.merging.dump import render_sources
from megalm.config.merging.flags import Flags, build_parser, parse_flags
from megalm.config.merging.nothing import NEEDS
from megalm.config.merging.recipe import KeyPath, Recipe, read_recipe
from megalm.config.merging.settings import SECTIONS, SETTINGS, Given, shortened
from megalm.config.output import HUGGING_FACE, hugging_face_folder
from megalm.config.rules.batch import with_micro_batch_size
from megalm.config.rules.layout import check_layout, impossible_layout
from megalm.config.rules.run import run_problems
from megalm.config.sections import RunConfig
from megalm.errors import ConfigError, LayoutError
from megalm.secrets import holds_secret
from megalm.storage.documents import DocumentError, parse_json

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
    notes: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    """Fields whose value does not fit, which is a problem already."""

    def judges(self, problem: str) -> bool:
        """Whether a problem is one of the given values, and not of a default in the place of a broken one."""
        names = [form for name in self.broken for form in (rf"\b{name}=", rf"{SETTINGS[name].flag}\b(?!-)")]
        return not any(re.search(name, problem) for name in names)


def load_config(argv: Sequence[str], prog: str | None = None) -> RunConfig:
    """The checked run that a command line describes. `--help` and `--print-config` print and exit with 0.

    Raises:
        ConfigError: holds every problem of flags, recipes, DeepSpeed JSON and their combination.
    """
    return load(argv, prog).config


def load(argv: Sequence[str], prog: str | None = None, defaults: Mapping[str, str] = MappingProxyType({})) -> Loaded:
    """As `load_config`, with the source of each value. `defaults` are the program's, below recipes and flags."""
    flags = parse_flags(argv, build_parser(prog))
    recipes = [read_recipe(path) for path in flags.recipes]
    lost = [problem for recipe in recipes if recipe.problems and not recipe.given for problem in recipe.problems]
    if lost:  # without the recipe everything seems to be missing
        raise ConfigError(flags.problems + lost)
    merge = merge_sources(flags, recipes, {name: Given(value, prog or DEFAULT) for name, value in defaults.items()})
    config = build_run(merge)
    if config is not None:
        merge.problems += [with_sources(found, merge.given) for found in run_problems(config) if merge.judges(found)]
    if merge.problems or config is None:
        raise ConfigError(list(dict.fromkeys(merge.problems)))
    sources = {name: given.source for name, given in merge.given.items() if given.source != DEFAULT}
    if flags.print_config:
        if impossible := impossible_layout(config):
            raise LayoutError([with_sources(problem, merge.given) for problem in impossible])
        sys.stdout.write(render_sources(config, sources))
        raise SystemExit(0)
    merge.notes += [note for recipe in recipes for note in recipe.notes]
    return Loaded(config, sources, merge.notes)


def merge_sources(flags: Flags, recipes: list[Recipe], defaults: Mapping[str, Given]) -> Merge:
    """Flags over recipes over each other and over `defaults`, then the DeepSpeed JSON beside them."""
    merge = Merge(given=dict(defaults), problems=list(flags.problems), notes=list(flags.notes))
    lines: dict[KeyPath, int] = {}
    for recipe in recipes:
        merge.problems += recipe.problems
        merge.given |= recipe.given
        if "deepspeed_config" in recipe.given:
            lines = recipe.lines
    merge.given |= flags.given
    take_hugging_face(merge)
    merge.given = {name: given for name, given in merge.given.items() if given.value is not None}
    convert_all(merge)
    refuse_secrets(merge)
    tell_tokenizer_vocab_size(merge.given)
    document = find_json(merge, lines)
    if document is not None:
        join_json(merge, document)
    if "zero_stage" not in merge.given:
        merge.given["zero_stage"] = Given(DEFAULT_ZERO_STAGE, DEFAULT)
    merge.problems += _unmet_needs(flags.needs + [name for recipe in recipes for name in recipe.needs], merge.given)
    return merge


def take_hugging_face(merge: Merge) -> None:
    """`--load hf:DIR` brings the model's settings and its tokenizer, where nobody gives others."""
    load = merge.given.get("load")
    folder = hugging_face_folder(load.value) if load is not None and isinstance(load.value, str) else None
    if folder is None:
        return
    path = folder / "config.json"
    try:
        values = parse_json(path.read_bytes())
        _, model = read_folder(values, folder)
    except (OSError, DocumentError) as error:
        merge.problems.append(f"--load {HUGGING_FACE}{folder}: {path} cannot be read: {error}")
        return
    except ConfigError as error:
        merge.problems += error.problems
        return
    for name, value in model.model_dump(exclude_unset=True).items():
        merge.given.setdefault(name, Given(value, str(path)))
    own = ("tokenizer_type", "tokenizer_model", "vocab_file", "mock_data")
    if not any(name in merge.given for name in own):
        merge.given["tokenizer_model"] = Given(str(folder), f"--load {HUGGING_FACE}{folder}")


def _unmet_needs(names: list[str], given: dict[str, Given]) -> list[str]:
    """What is missing of the fields without which flags without effect would stand for something."""
    problems = []
    for name in dict.fromkeys(names):
        if name not in NEEDS:
            continue
        field_name, least = NEEDS[name]
        setting, value = SETTINGS[field_name], given.get(field_name, Given(None, DEFAULT)).value
        wanted = " or ".join(least) if isinstance(least, tuple) else setting.metavar
        if field_name not in given:
            problems.append(f"{field_name} is missing; give {setting.flag} {wanted}")
        elif isinstance(least, tuple) and value is not None and value not in least:
            problems.append(f"--{name} needs {field_name}={wanted}, not {value}; drop one of them")
        elif isinstance(least, int) and value is not None and value < least:
            problems.append(f"--{name} needs {field_name} >= {least}, not {value}; drop one of them")
    return problems


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
            shown = " ".join(map(str, given.value)) if isinstance(given.value, list) else shortened(given.value)
            merge.problems.append(f"{name}={shown} ({given.source}) {error}")
            merge.given[name] = Given(None, given.source)
            merge.broken.add(name)


def refuse_secrets(merge: Merge) -> None:
    """What looks like a secret is a problem and is taken out: config.yaml, checkpoints and logs show every setting."""
    for name, given in list(merge.given.items()):
        if not isinstance(given.value, int | float) and holds_secret(str(given.value)):
            merge.problems.append(
                f"{name} ({given.source}) holds what looks like a secret (a password before @ in an address, or a "
                "token), and config.yaml, checkpoints and logs show every setting; give it without"
            )
            merge.given[name] = Given(None, given.source)


def tell_tokenizer_vocab_size(given: dict[str, Given]) -> None:
    """Lets vocab_size give the number of ids of a tokenizer whose files do not tell it, as Megatron means it."""
    kind = given.get("tokenizer_type", Given(None, DEFAULT)).value
    if kind not in ("NullTokenizer", "TikTokenizer") or "vocab_size" not in given or "tokenizer_vocab_size" in given:
        return
    given["tokenizer_vocab_size"] = given["vocab_size"]
    if kind == "NullTokenizer":
        del given["vocab_size"]  # the model's is one more, for the end of document


def join_json(merge: Merge, document: DeepSpeedJson) -> None:
    """The JSON's facts fill what nobody else gave and must agree with what somebody did.

    A flag wins over a JSON that a recipe names, as over the recipe itself, and says so.
    """
    check_json(document)
    of_recipe = not merge.given["deepspeed_config"].source.startswith("--")
    for name, given, shown in facts(document):
        try:
            value = SETTINGS[name].convert(given.value)
        except ValueError as error:
            merge.problems.append(f"{given.source}: {shown}: {name} {error}")
            continue
        other = merge.given.setdefault(name, Given(value, given.source))
        if other.value == value or other.value is None:
            continue
        if of_recipe and other.source.startswith("--"):
            merge.notes.append(f"{name}={other.value} ({other.source}) replaces {shown} ({given.source})")
        else:
            merge.problems.append(
                f"{name}={other.value} ({other.source}) but {shown} ({given.source}); "
                'say it once, or write "auto" in the DeepSpeed JSON'
            )
    stage, ranks = (merge.given.get(name, Given(None, DEFAULT)).value for name in _JSON_NEEDS)
    check_engine_keys(document, DEFAULT_ZERO_STAGE if stage is None else stage, pipeline=(ranks or 1) > 1)
    merge.problems += document.problems
    merge.notes += document.notes
    content = remainder(document)
    merge.given["deepspeed_config"] = Given(content or None, merge.given["deepspeed_config"].source)


_JSON_NEEDS = ("zero_stage", "pipeline_model_parallel_size")
"""Settings by which the meaning of DeepSpeed's keys differs."""


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
                broken = broken or setting.required  # else the other settings are judged beside its default
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
            merge.problems += [with_sources(found, merge.given) for found in part.problems() if merge.judges(found)]
    return None


def with_sources(problem: str, given: dict[str, Given]) -> str:
    """The problem, followed by where the values in it (name=value) were given."""
    names = dict.fromkeys(re.findall(r"\b([a-z][a-z0-9_]*)=", problem))
    sources = [f"{name}: {given[name].source}" for name in names if name in given and given[name].source != DEFAULT]
    return f"{problem} ({', '.join(sources)})" if sources else problem
