"""Every setting of a run by its flag name, read off the section classes: section, type, default, choices, help text.

Nothing is listed here: a field added to a section becomes a flag, a recipe key and a line of the reference by itself.
"""

import re
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from megalm.config.base import OpenChoice, Section
from megalm.config.merging.names import VALUE_ALIASES
from megalm.config.merging.suggest import did_you_mean
from megalm.config.merging.typography import pasted_in
from megalm.config.paths import InputPath
from megalm.config.ranges import LARGEST
from megalm.config.sections import RunConfig


@dataclass(frozen=True)
class Given:
    """A value that somebody gave, and where: `--lr`, `recipe.yaml:4` or `zero1.json:7`."""

    value: Any
    source: str


@dataclass(frozen=True)
class Setting:
    """One field of one section."""

    section: str
    name: str
    info: FieldInfo

    @property
    def flag(self) -> str:
        """The flag: --num-layers for num_layers."""
        return "--" + self.name.replace("_", "-")

    @property
    def help(self) -> str:
        """The string under the field, on one line."""
        return " ".join((self.info.description or "").split())

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.info.is_required()

    @property
    def default(self) -> Any:
        """The default value; None where the help text tells the default or there is none."""
        return None if self.required or self.info.default == () else self.info.default

    @property
    def types(self) -> tuple[Any, ...]:
        """The types that a value may have, without None."""
        annotation = self.info.annotation
        union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
        members = typing.get_args(annotation) if union else (annotation,)
        return tuple(
            typing.get_args(t)[0] if typing.get_origin(t) is Annotated else t
            for t in members
            if t is not types.NoneType
        )

    @property
    def is_bool(self) -> bool:
        """Whether the flag takes no value."""
        return bool in self.types

    @property
    def is_list(self) -> bool:
        """Whether the flag takes several values."""
        return any(typing.get_origin(t) in (list, tuple) for t in self.types)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that a value may be; empty when it is free."""
        words = (typing.get_args(t) for t in self.types if typing.get_origin(t) is typing.Literal)
        return tuple(str(word) for group in words for word in group) + self.open_choices

    @property
    def open_choices(self) -> tuple[str, ...]:
        """Words that a value may be, besides those that modules of --import-module add."""
        return tuple(name for known in self.info.metadata if isinstance(known, OpenChoice) for name in known.names)

    @property
    def input_path(self) -> InputPath | None:
        """How a path that is read is looked for; None for what is no such path."""
        return next((known for known in self.info.metadata if isinstance(known, InputPath)), None)

    @property
    def metavar(self) -> str:
        """What --help shows for the value."""
        if self.choices:
            return "{" + ",".join(self.choices) + "}"
        if self.is_list or str in self.types:
            return "TEXT"
        return "N" if int in self.types else "X"

    def convert(self, value: Any) -> Any:
        """`value` as this field's type: text becomes a number, a choice is found in any case.

        Raises:
            ValueError: the value does not fit; the text says the rule.
        """
        try:
            return self._converted(value)
        except ValueError as error:
            raise ValueError(f"{error}{pasted_in(value)}") from error

    def _converted(self, value: Any) -> Any:
        if isinstance(value, bool) and not self.is_bool:
            raise ValueError(f"must be {self.metavar}, not true or false")
        if self.choices and isinstance(value, str):
            return self._choose(value)
        if int in self.types and isinstance(value, str) and _WHOLE.fullmatch(value) and float(value).is_integer():
            value = int(float(value))  # 3e9 is a whole number in a flag as it is in a recipe
        if _is_too_long(value) or (isinstance(value, int) and abs(value) > _LARGEST_WHOLE):
            raise ValueError(f"must be {self.metavar} of at most {_LARGEST_WHOLE}")
        try:
            found = self._adapter().validate_python(value)
        except ValidationError as error:
            errors = error.errors()
            own = [e for e in errors if e["type"] == "value_error"]  # a rule of ours knows what is meant
            raise ValueError(" or ".join(dict.fromkeys(rule(e["msg"]) for e in own or errors))) from error
        if isinstance(found, int) and abs(found) > _LARGEST_WHOLE:
            raise ValueError(f"must be at most {_LARGEST_WHOLE}")
        return found

    def _choose(self, word: str) -> str:
        word = VALUE_ALIASES.get(self.name, {}).get(word.lower(), word)
        for choice in self.choices:
            if choice.lower() == word.lower():
                return choice
        if self.open_choices:
            return word
        raise ValueError(f"must be one of {', '.join(self.choices)}{did_you_mean(word, self.choices)}")

    def _adapter(self) -> TypeAdapter[Any]:
        annotation: Any = self.info.annotation
        if int in self.types and not any(hasattr(one, "le") or hasattr(one, "lt") for one in self.info.metadata):
            annotation = Annotated[annotation, Field(le=LARGEST)]
        for constraint in self.info.metadata:
            annotation = Annotated[annotation, constraint]
        return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))


_WHOLE = re.compile(r"[-+]?[0-9]{1,20}(?:\.[0-9]{0,20})?[eE]\+?[0-9]{1,2}")
_LARGEST_WHOLE = 2**64 - 1
"""Of whole numbers that any setting takes."""


def _is_too_long(value: Any) -> bool:
    """Whether a text of digits is longer than any number that a setting takes."""
    return isinstance(value, str) and len(value) > 300 and value.strip("+-_.").isdigit()


def shortened(value: Any) -> str:
    """A value as a message shows it."""
    text = str(value) if not isinstance(value, int) or abs(value) <= _LARGEST_WHOLE else f"{value:.6e}"
    return text if len(text) <= 200 else f"{text[:40]}... ({len(text)} characters)"


def rule(message: str) -> str:
    """pydantic's text as the end of a sentence: "Input should be a valid number, unable ..." as "must be a number"."""
    if message.startswith("Value error, "):
        return message.removeprefix("Value error, ")
    text = message.replace("Input should be", "must be").partition(", ")[0]
    text = text.replace("Unable to parse input string as an integer", "must be a whole number")
    for theirs, ours in (("valid integer", "whole number"), ("valid boolean", "true or false"), ("valid ", "")):
        text = text.replace(f"a {theirs}", ours if ours.startswith("true") else f"a {ours}")
    return text


def section_classes() -> dict[str, type[Section]]:
    """The class of each section of `RunConfig`, by its name in a recipe, in order."""
    classes = {}
    for name, info in RunConfig.model_fields.items():
        cls: Any = info.annotation
        assert issubclass(cls, Section), f"{name} is no section"
        classes[name] = cls
    return classes


SECTIONS = section_classes()
SETTINGS = {
    name: Setting(section, name, info) for section, cls in SECTIONS.items() for name, info in cls.model_fields.items()
}
