"""Numbers out of range are refused where they are given: every number of every command, every setting of a run."""

import argparse
import contextlib
import importlib
import io

import pytest

from megalm.cli import _COMMANDS
from megalm.config.merging.settings import SETTINGS, Setting
from megalm.config.output import load_argument
from megalm.config.paths import path_argument

OUT = ["nan", "inf", "-inf", "1e400", "9" * 30, "9" * 5000, "-7", "", "x"]
"""What no number of megalm may be."""
PATHS = (path_argument, load_argument)


def numbers() -> list[tuple[str, argparse.Action]]:
    """Every flag of every command that takes a number."""
    found = []
    for command, (module, _) in _COMMANDS.items():
        parser = argparse.ArgumentParser()
        importlib.import_module(module).add_arguments(parser)
        for action in parser._actions:
            if action.type is not None and not isinstance(action.type, type(str)) and action.type not in PATHS:
                found.append((command, action))
            assert action.type not in (int, float), f"megalm {command} {action.option_strings}: give it a range"
    return found


@pytest.mark.parametrize("word", OUT, ids=lambda word: word[:8])
def test_commands_refuse_it(word: str) -> None:
    taken = []
    for command, action in numbers():
        parser = argparse.ArgumentParser(exit_on_error=False)
        parser.add_argument(action.option_strings[0], type=action.type)
        with contextlib.suppress(argparse.ArgumentError), contextlib.redirect_stderr(io.StringIO()):
            parser.parse_args([f"{action.option_strings[0]}={word}"])
            taken.append(f"megalm {command} {action.option_strings[0]}={word}")
    assert taken == []


NUMBERS = [setting for setting in SETTINGS.values() if {int, float} & set(setting.types) and str not in setting.types]


@pytest.mark.parametrize("setting", NUMBERS, ids=lambda setting: setting.name)
def test_settings_refuse_it(setting: Setting) -> None:
    words = [word for word in OUT if not (word == "9" * 30 and float in setting.types)]
    if setting.name == "local_rank":  # the launcher's
        words.remove("-7")
    for word in words:
        with pytest.raises(ValueError, match="must be"):
            setting.convert(word)


def test_a_seed_is_one_that_every_library_takes() -> None:
    assert SETTINGS["seed"].convert("4294967295") == 2**32 - 1
    with pytest.raises(ValueError, match="less than or equal to 4294967295"):
        SETTINGS["seed"].convert("4294967296")
