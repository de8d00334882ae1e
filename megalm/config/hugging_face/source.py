"""A config.json while it is read: which keys were asked for, and what of it cannot be."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Source:
    """The values of one config.json over the defaults of its class."""

    values: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or what the class takes where there is none."""
        return self.values.get(key, self.defaults.get(key, default))

    def refuse(self, text: str) -> None:
        """Note something that megalm's models do not have."""
        self.problems.append(text)

    def number(self, key: str, value: Any) -> Any:
        """`value` if it is a number or nothing."""
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            self.refuse(f"{key}={value!r} must be a number")
            return None
        return value
