"""Tables of things by name that can be extended from outside the package: objectives, model families, optimizers, ...

# my_package/my_optimizer.py, named by --import-module my_package.my_optimizer
from megalm.engine.optimizers import OPTIMIZERS

OPTIMIZERS.add("sgd", SgdSpec())
"""

import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from megalm.config.merging.suggest import did_you_mean
from megalm.errors import ConfigError

T = TypeVar("T")


class Table(Mapping[str, T], Generic[T]):
    """Things of one kind by name; `setting` is the one whose value names them."""

    def __init__(self, setting: str, entries: Mapping[str, T]) -> None:
        self.setting = setting
        self._entries = dict(entries)

    def add(self, name: str, thing: T) -> None:
        """One more entry.

        Raises:
            ConfigError: another one has this name.
        """
        if self._entries.setdefault(name, thing) is not thing:
            raise ConfigError(f"{self.setting}={name} is taken by {self._entries[name]}; give it another name")

    def __getitem__(self, name: str) -> T:
        """The entry `name`.

        Raises:
            ConfigError: there is none.
        """
        if name not in self._entries:
            raise ConfigError(
                f"{self.setting}={name} must be one of {', '.join(self._entries)}{did_you_mean(name, self._entries)}; "
                "or name the module that adds it: --import-module MODULE"
            )
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def import_modules(names: Iterable[str]) -> None:
    """Import the modules of --import-module, which add their entries to the tables.

    Raises:
        ConfigError: one cannot be imported.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"import_module={name} cannot be imported ({type(error).__name__}: {error}); give a module that Python "
                "finds: one that is installed, or in a folder of PYTHONPATH"
            ) from error
