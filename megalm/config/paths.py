"""What a path is, wherever one is given: in a flag, a recipe, a site file, or an argument of a command.

`~` and `$NAME` mean what they mean in a shell, which does not see them in `--save=~/run` or in a file. Nothing is no
path: a run would land in the current folder.
"""

import argparse
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from megalm.shipped import shipped_file

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})", re.ASCII)
_OF_A_SHELL = re.compile(r"\$\{(?!\w+\})[^}]*\}?", re.ASCII)
"""${NAME:-default}, or what lacks its end."""


def read_path(text: str) -> str:
    """The path that a user means by `text`.

    Raises:
        ValueError: nothing, a variable or a user that is not there; the text says the rule.
    """
    if not text.strip() or "\0" in text:
        raise ValueError(f'must be a path, not "{text}"; leave it out for its default')
    path = os.path.expanduser(read_variables(text))
    if path.startswith("~"):
        user = path.partition("/")[0]
        raise ValueError(f"begins with {user}, and no user has that name here; write ./{user} for a folder named so")
    return path


def read_variables(text: str) -> str:
    """`text` with the values of its variables.

    Raises:
        ValueError: one is not set, or what only a shell reads.
    """
    path = os.path.expandvars(text)
    if (found := _OF_A_SHELL.search(text)) is not None:
        raise ValueError(f"holds {found[0]}; variables are $NAME or ${{NAME}} here, without a shell's other forms")
    if left := [name for name in variables_of(path) if f"${name}" in text or f"${{{name}}}" in text]:
        raise ValueError(f"names ${left[0]}, which is not set here; set it, or write the path out")
    return path


def variables_of(text: str) -> list[str]:
    """The names of the variables in a text."""
    return [plain or braced for plain, braced in _VARIABLE.findall(text)]


def path_argument(text: str) -> str:
    """`read_path` for the parsers of commands: `add_argument(..., type=path_argument)`."""
    try:
        return read_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _read(value: Any) -> Any:
    return read_path(value) if isinstance(value, str) else value


PathText = Annotated[str, BeforeValidator(_read)]
"""The type of a setting that is a path."""


@dataclass(frozen=True)
class InputPath:
    """A path that is read: a relative one of a recipe may also lie beside the recipe.

    Stands in the annotation of a field: `Annotated[PathText | None, InputPath()]`.
    """

    endings: tuple[str, ...] = ("",)
    """What is there of it: PREFIX.idx of PREFIX."""
    prefix: str = ""
    """What may stand before the path."""

    def find(self, recipe: str, text: str) -> str | None:
        """What a recipe means by a path: an absolute one as it is, else the one from the current folder, the one
        beside the recipe, the one that comes with megalm: the first that is there. None: none is.
        """
        if self.prefix and text.startswith(self.prefix):
            found = InputPath(self.endings).find(recipe, text.removeprefix(self.prefix))
            return None if found is None else self.prefix + found
        if text[:1] in ("", "/", "~", "$"):
            return text
        candidates = [text, str(Path(os.path.abspath(recipe)).parent / text), shipped_file(text)]
        return next((path for path in candidates if path is not None and self._is_there(path)), None)

    def _is_there(self, path: str) -> bool:
        return any(os.path.exists(path + ending) for ending in self.endings)
