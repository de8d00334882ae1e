"""A recipe (YAML file) in, its values with file and line out; unknown, misplaced and repeated keys are problems."""

import os
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megalm.config.merging.names import IMPLIED, RENAMED, unsupported_text
from megalm.config.merging.settings import SECTIONS, SETTINGS, Given, Setting
from megalm.config.merging.suggest import did_you_mean
from megalm.shipped import shipped_hint

KeyPath = tuple[str, ...]

# YAML 1.1 reads 3e-4 and 5e8 as text because they lack a point; everybody means numbers.
_FLOAT = re.compile(r"^[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$")


class RecipeLoader(yaml.SafeLoader):
    """YAML without code, in which 3e-4 is a number."""


class RecipeDumper(yaml.SafeDumper):
    """Writes what `RecipeLoader` reads back equal."""


for _class in (RecipeLoader, RecipeDumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


@dataclass
class Recipe:
    """What one recipe file says."""

    given: dict[str, Given] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Which file is meant where that is not the one from the current folder."""


def read_recipe(path: str) -> Recipe:
    """The values of a recipe file by field name; null means "the default", also over an earlier recipe."""
    recipe = Recipe()
    data = _parse(path, recipe)
    for section, content in data.items():
        source = f"{path}:{recipe.lines.get((str(section),), 1)}"
        if section not in SECTIONS:
            recipe.problems.append(f"{source}: {_unknown_top_level(str(section))}")
        elif content is None:
            continue
        elif not isinstance(content, dict):
            recipe.problems.append(f"{source}: {section}={content!r} must be a block of settings, one a line")
        else:
            _read_section(path, section, content, recipe)
    return recipe


def _read_section(path: str, section: str, content: dict[Any, Any], recipe: Recipe) -> None:
    for key, value in content.items():
        source = f"{path}:{recipe.lines.get((section, str(key)), 1)}"
        setting = SETTINGS.get(key)
        if setting is None or setting.section != section:
            recipe.problems.append(f"{source}: {_unknown_in_section(str(key), section)}")
        else:
            recipe.given[key] = Given(_located(path, setting, value, source, recipe.notes), source)


def _located(recipe: str, setting: Setting, value: Any, source: str, notes: list[str]) -> Any:
    """A value with the relative paths in it that are read: as they are, else as they are found beside the recipe."""
    if setting.input_path is None or not isinstance(value, str | list):
        return value
    if isinstance(value, list):
        return [_located(recipe, setting, word, source, notes) if isinstance(word, str) else word for word in value]
    found = setting.input_path.find(recipe, value)
    if found is None and not re.fullmatch(r"[\d.eE+-]+", value):  # the weight of a dataset
        notes.append(f"{setting.name}: {value} ({source}) is neither in {os.getcwd()} nor beside the recipe")
    elif found not in (None, value):
        notes.append(f"{setting.name}: {value} ({source}) is not in {os.getcwd()}; {found} is taken")
    return found or value


def _parse(path: str, recipe: Recipe) -> dict[Any, Any]:
    try:
        loader = RecipeLoader(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.reader.ReaderError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or error
        recipe.problems.append(f"--config {path} cannot be read: {reason}{shipped_hint(path)}")
        return {}
    try:
        node = loader.get_single_node()
        _walk(node, (), path, recipe, set())
        data = loader.construct_document(node) if node is not None else {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        source = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else path
        recipe.problems.append(f"{source}: not YAML: {error.problem or error.context}")
        return {}
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        recipe.problems.append(f"{path}: a recipe is a mapping of sections ({', '.join(SECTIONS)})")
        return {}
    return data


def _walk(node: yaml.Node | None, path: KeyPath, file: str, recipe: Recipe, done: set[int]) -> None:
    """Note the line of every key and report the keys that occur twice in one mapping; an alias is looked at once."""
    if node is None or id(node) in done:
        return
    done.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _walk(item, (*path, f"[{number}]"), file, recipe, done)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[Hashable, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        line = key.start_mark.line + 1
        if key.value in seen:
            first = seen[key.value]
            recipe.problems.append(f'{file}:{line}: "{key.value}" stands twice, first on line {first}; keep one')
        seen.setdefault(key.value, line)
        below = (*path, str(key.value))
        recipe.lines.setdefault(below, line)
        _walk(value, below, file, recipe, done)


def _unknown_top_level(key: str) -> str:
    if key in SETTINGS:
        return f"{key} belongs under {SETTINGS[key].section}:"
    return _peer_name(key) or f'unknown section "{key}"{did_you_mean(key, [*SECTIONS, *SETTINGS])}'


def _unknown_in_section(key: str, section: str) -> str:
    if key in SETTINGS:
        return f"{key} belongs under {SETTINGS[key].section}:, not {section}:"
    own = [name for name, setting in SETTINGS.items() if setting.section == section]
    suggestion = did_you_mean(key, own) or did_you_mean(key, SETTINGS)
    return _peer_name(key) or f'unknown key "{key}" in {section}{suggestion}'


def _peer_name(key: str) -> str | None:
    """What a peer's flag name is called in a recipe, or what to use instead."""
    flag = key.replace("_", "-")
    if flag.replace("-", "_") in SETTINGS:
        name = flag.replace("-", "_")
        return f'"{key}" is written {name} in a recipe, under {SETTINGS[name].section}:'
    if flag in RENAMED:
        name = RENAMED[flag]
        return f'"{key}" is a flag of the peers; in a recipe write {name} under {SETTINGS[name].section}:'
    if flag in IMPLIED:
        name, value = IMPLIED[flag]
        return f'"{key}" is a flag of the peers; in a recipe write {name}: {value} under {SETTINGS[name].section}:'
    return unsupported_text(flag)
