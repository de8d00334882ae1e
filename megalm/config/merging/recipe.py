"""A recipe (YAML file) in, its values with file and line out; unknown, misplaced and repeated keys are problems."""

import os
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import yaml

from megalm.config.merging.names import IMPLIED, RENAMED, unsupported_text
from megalm.config.merging.nothing import NO_EFFECT
from megalm.config.merging.settings import SECTIONS, SETTINGS, Given, Setting
from megalm.config.merging.suggest import did_you_mean
from megalm.shipped import shipped_hint
from megalm.storage.documents import BoundedLoader, DocumentError, parse_yaml, read_settings
from megalm.storage.faults import reason_of

KeyPath = tuple[str, ...]

_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_DIGITS = "[0-9](?:_?[0-9])*"
_NUMBERS = {
    _INT: re.compile(rf"^[-+]?{_DIGITS}$"),
    _FLOAT: re.compile(rf"^[-+]?(?:(?:{_DIGITS}\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|\.inf|\.nan)$", re.IGNORECASE),
}
_LONGEST = 300
"""Characters of a number; what is longer is text, which no setting takes for a number."""


class RecipeLoader(BoundedLoader):
    """YAML without code, in which numbers are those of flags: decimal, 010 is 10, 3e-4 is a number, 1:30 is text."""

    def number(self, node: yaml.ScalarNode) -> int | float | str:
        """A number in decimal."""
        text = self.construct_scalar(node).replace("_", "")
        if len(text) > _LONGEST:
            return text
        if node.tag == _INT:
            return int(text)
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


class RecipeDumper(yaml.SafeDumper):
    """Writes what `RecipeLoader` reads back equal."""


for _class in (RecipeLoader, RecipeDumper):
    # YAML 1.1's own rules read 010 as 8, 1:30 as 90 and 3e-4 as text
    _class.yaml_implicit_resolvers = {
        first: [(tag, rule) for tag, rule in rules if tag not in _NUMBERS]
        for first, rules in _class.yaml_implicit_resolvers.items()
    }
    for _tag, _rule in _NUMBERS.items():
        _class.add_implicit_resolver(_tag, _rule, list("-+0123456789."))
for _tag in _NUMBERS:
    RecipeLoader.add_constructor(_tag, RecipeLoader.number)


@dataclass
class Recipe:
    """What one recipe file says."""

    given: dict[str, Given] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Which file is meant where that is not the one from the current folder."""
    needs: list[str] = field(default_factory=list)
    """Names without effect that may rely on a field (`nothing.NEEDS`)."""


def read_recipe(path: str) -> Recipe:
    """The values of a recipe file by field name; null means "the default", also over an earlier recipe."""
    recipe = Recipe()
    data = _parse(path, recipe)
    for section, content in data.items():
        source = f"{path}:{recipe.lines.get((str(section),), 1)}"
        if section not in SECTIONS and _asks_for_nothing(section, content, source, recipe):
            continue
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
        if setting is None and _asks_for_nothing(key, value, source, recipe):
            continue
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


def _asks_for_nothing(key: Any, value: Any, source: str, recipe: Recipe) -> bool:
    """Whether a key is a peer's flag without effect; the recipe notes it, or why its value is wrong."""
    name = str(key).replace("_", "-")
    nothing = NO_EFFECT.get(name)
    if nothing is None:
        return False
    if not nothing.allows(value):
        recipe.problems.append(f"{source}: {nothing.problem(str(key), value)}")
    elif value is not None and value is not False:  # 0 is a value
        recipe.notes.append(f"{key} ({source}) has no effect: {nothing.why}")
        recipe.needs.append(name)
    return True


def _parse(path: str, recipe: Recipe) -> dict[Any, Any]:
    try:
        node, data = parse_yaml(read_settings(path), RecipeLoader)
    except OSError as error:
        recipe.problems.append(f"--config {path} cannot be read: {reason_of(error, path)}{shipped_hint(path)}")
        return {}
    except DocumentError as error:
        place = ":".join(str(number) for number in (error.line, error.column) if number)
        recipe.problems.append(f"{path}:{place}: {error}" if place else f"--config {path} cannot be read: {error}")
        return {}
    _walk(node, (), path, recipe, set())
    if not isinstance(data, dict | None):
        recipe.problems.append(f"{path}: a recipe is a mapping of sections ({', '.join(SECTIONS)})")
        return {}
    return data or {}


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
