"""A command line in, the given values with their flags out; the parser is generated from the sections."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megalm.config.merging.names import IMPLIED, NEEDS, NO_EFFECT, RENAMED, unsupported_text
from megalm.config.merging.settings import SECTIONS, SETTINGS, Given, Setting
from megalm.config.merging.suggest import did_you_mean
from megalm.config.paths import read_path

_EPILOG = (
    "Order: defaults < recipes (--config, left to right) < flags. Flags may be spelled with - or _. "
    "FLAG none takes a setting of a recipe back to its default."
)


@dataclass
class Flags:
    """What a command line says."""

    given: dict[str, Given] = field(default_factory=dict)
    recipes: list[str] = field(default_factory=list)
    print_config: bool = False
    notes: list[str] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)
    """Fields that a flag without effect relies on."""
    problems: list[str] = field(default_factory=list)


class _Missing:
    """A flag that needs a value and has none."""


class _Formatter(argparse.HelpFormatter):
    """Shows values without the brackets of "optional": a missing value is reported by `parse_flags`."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return "" if action.nargs == 0 else str(action.metavar or default_metavar)


class _Record(argparse.Action):
    """Writes (field, value, flag) to the namespace's list; `fixed` maps flags without a value to what they mean."""

    def __init__(self, option_strings: Sequence[str], dest: str, fixed: dict[str, Any] | None = None, **kwargs: Any):
        self.fixed = fixed
        kwargs.setdefault("nargs", "?" if fixed is None else 0)
        super().__init__(option_strings, dest, const=_Missing, default=argparse.SUPPRESS, **kwargs)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        assert option is not None, "every setting is a flag"
        if self.fixed is not None:
            values = self.fixed[option]
        namespace.said.append((self.dest, values, option))


class _NoEffect(argparse.Action):
    """Notes a flag that is accepted because what it asks for is always so."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        assert option is not None, "every setting is a flag"
        allowed, reason = NO_EFFECT[self.dest]
        if allowed and values not in allowed:
            namespace.problems.append(f"{option} {values} is not supported here: {reason}; use {' or '.join(allowed)}")
        else:
            namespace.notes.append(f"{option} has no effect: {reason}")
            namespace.needs += [NEEDS[self.dest]] if self.dest in NEEDS else []


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The parser of all flags, one group a section. It checks names only; values are checked by `load_config`."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [--config FILE.yaml] [--flag value ...]",
        epilog=_EPILOG,
        allow_abbrev=False,
        formatter_class=_Formatter,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        nargs="?",
        default=[],
        help="recipe: a YAML file with sections; several are merged left to right",
    )
    parser.add_argument("--print-config", action="store_true", help="print the merged configuration and exit")
    for section, cls in SECTIONS.items():
        group = parser.add_argument_group(section, " ".join((cls.__doc__ or "").split()))
        for setting in SETTINGS.values():
            if setting.section == section:
                _add_setting(group, setting)
    other = parser.add_argument_group("accepted, without effect", "What these ask for is always so.")
    for name, (allowed, reason) in NO_EFFECT.items():
        metavar = "{" + ",".join(allowed) + "}"
        kwargs: dict[str, Any] = {"nargs": "?", "metavar": metavar} if allowed else {"nargs": 0}
        other.add_argument("--" + name, action=_NoEffect, dest=name, default=argparse.SUPPRESS, help=reason, **kwargs)
    return parser


def option_names(setting: Setting) -> tuple[list[str], list[str]]:
    """The flags that set a field to the value after them (or to true), and those that set it to false."""
    names = [setting.flag] + ["--" + alias for alias, name in RENAMED.items() if name == setting.name]
    if not setting.is_bool:
        return names, []
    opposite = setting.flag.removeprefix("--no-") if setting.name.startswith("no_") else "no-" + setting.flag[2:]
    return names, ["--" + opposite]


def help_text(setting: Setting) -> str:
    """The help text with its default."""
    if setting.required:
        return setting.help + " Required."
    if setting.default is None or "Default:" in setting.help:
        return setting.help
    shown = str(setting.default).lower() if setting.is_bool else setting.default
    return f"{setting.help} Default: {shown}."


def _add_setting(group: Any, setting: Setting) -> None:
    text = help_text(setting).replace("%", "%%")
    positive, negative = option_names(setting)
    if setting.is_bool:
        fixed = dict.fromkeys(positive, True) | dict.fromkeys(negative, False)
        group.add_argument(*positive, *negative, action=_Record, dest=setting.name, fixed=fixed, help=text)
    else:
        kwargs: dict[str, Any] = {"nargs": "*"} if setting.is_list else {}
        group.add_argument(*positive, action=_Record, dest=setting.name, metavar=setting.metavar, help=text, **kwargs)
    for alias, (name, value) in IMPLIED.items():
        if name == setting.name:
            same = f"Same as {setting.flag} {value}."
            group.add_argument("--" + alias, action=_Record, dest=name, fixed={"--" + alias: value}, help=same)


def parse_flags(argv: Sequence[str], parser: argparse.ArgumentParser | None = None) -> Flags:
    """Everything that `argv` gives; every unknown or incomplete flag becomes a problem.

    The last of several equal flags counts, so that a wrapper script can append its own. `--help` prints and exits.
    """
    parser = parser or build_parser()
    start = argparse.Namespace(said=[], problems=[], notes=[], needs=[])
    tokens = _without_values_of_switches([_dashes(token) for token in argv], parser, start.problems)
    space, unknown = parser.parse_known_args(tokens, namespace=start)
    flags = Flags(print_config=space.print_config, notes=space.notes, needs=space.needs, problems=space.problems)
    for file in filter(None.__ne__, space.config):
        try:
            flags.recipes.append(read_path(file))
        except ValueError as error:
            flags.problems.append(f"--config {file} {error}")
    if None in space.config:
        flags.problems.append("--config needs a value: --config FILE")
    for name, value, option in space.said:
        if value is _Missing or value == []:
            flags.problems.append(f"{option} needs a value: {option} {SETTINGS[name].metavar}")
        else:
            flags.given[name] = Given(_none(SETTINGS[name], value), option)
    flags.problems += _unknown_problems(unknown, parser)
    return flags


def _none(setting: Setting, value: Any) -> Any:
    """None for the word "none" where a setting may have no value."""
    optional = not setting.required and setting.default is None
    return None if optional and isinstance(value, str) and value.lower() == "none" else value


def _without_values_of_switches(tokens: list[str], parser: argparse.ArgumentParser, problems: list[str]) -> list[str]:
    """The tokens without --switch=value, each of which is a problem."""
    switches = {option for option, action in parser._option_string_actions.items() if action.nargs == 0}
    kept = []
    for token in tokens:
        name, equals, value = token.partition("=")
        if equals and name in switches:
            negative = f", or --no-{name[2:]} for false" if f"--no-{name[2:]}" in switches else ""
            problems.append(f'{name} takes no value, not "{value}"; write {name}{negative}')
        else:
            kept.append(token)
    return kept


def _dashes(token: str) -> str:
    """A flag with - for _ in its name; anything else unchanged."""
    if not token.startswith("--"):
        return token
    name, equals, value = token.partition("=")
    return name.replace("_", "-") + equals + value


def _unknown_problems(tokens: list[str], parser: argparse.ArgumentParser) -> list[str]:
    known = {option[2:] for option in parser._option_string_actions if option.startswith("--")}
    problems = []
    after_unknown = False
    for token in tokens:
        if token.startswith("--") and token != "--":
            name = token[2:].partition("=")[0]
            problems.append(unsupported_text(name) or f"unknown flag --{name}{did_you_mean(name, known, '--')}")
            after_unknown = True
        elif not after_unknown:
            problems.append(f'unexpected argument "{token}": values follow their flag; quote a value with blanks')
    return problems
