"""Arrays that take long to build, kept in a folder and mapped from there: one entry a key, one builder a node.

An entry is NAME-ARRAY.npy for each array and NAME.json, which is written last and holds size and SHA-256 of each;
NAME is the hash of everything that the arrays follow from. Every file gets its name complete and on disk (rename), so
readers take no lock, and any number of builders, on nodes that share the folder or have one each, only write equal
files.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.errors import DataError
from megalm.storage.atomic import atomic_write_by_any
from megalm.storage.documents import Count, PlainName, Sha256, parse_json, validated
from megalm.storage.durable import open_kept, sha256_of
from megalm.storage.faults import attempting
from megalm.storage.lock import sign, take
from megalm.storage.whole_file import WholeFile

log = logging.getLogger("megalm")

Arrays = dict[str, npt.NDArray[Any]]
_VERSION = 1


class CachedArrays(dict[str, npt.NDArray[Any]]):
    """Arrays that are mapped from files."""

    def __init__(self, arrays: Arrays, files: tuple[WholeFile, ...]) -> None:
        super().__init__(arrays)
        self.files = files
        """`require` each before a look at the arrays."""


@dataclass(frozen=True)
class _Facts:
    """What NAME.json says of an array."""

    bytes: Count
    sha256: Sha256


@dataclass(frozen=True)
class _Entry:
    """What is needed of NAME.json."""

    arrays: dict[PlainName, _Facts]


class IndexCache:
    """A folder of index arrays.

    Raises:
        DataError (from `get`): the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def get(self, key: dict[str, Any], build: Callable[[], Arrays]) -> CachedArrays:
        """The arrays of `key` (anything that JSON holds), read-only and mapped; built first if they are not there.

        An entry whose files are missing, cut off or changed is built again. Phases: load; wait for a builder of the
        same entry on this node, load; build, write, load.
        """
        text = json.dumps({"version": _VERSION, **key}, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        arrays = self._load(name)
        if arrays is not None:
            return arrays
        advice = "give another --data-cache-path, or drop it: the index is then built in memory at every start"
        with attempting("write the index cache", self.folder, DataError, advice):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._only_builder(name):
                arrays = self._load(name)  # another process may have built it in the meantime
                if arrays is None:
                    built = build()
                    self._store(name, text, built)
                    arrays = self._load(name) or CachedArrays(built, ())
                return arrays

    def _load(self, name: str) -> CachedArrays | None:
        """The mapped arrays of an entry that is there and sound."""
        try:
            entry = validated(_Entry, parse_json((self.folder / f"{name}.json").read_bytes()))
            arrays, files = {}, []
            for array, facts in entry.arrays.items():
                path = self.folder / f"{name}-{array}.npy"
                files.append(WholeFile(path, "start again: it is built again"))
                if path.stat().st_size != facts.bytes or sha256_of(path) != facts.sha256:
                    raise ValueError(f"{path.name} is not what was written")
                arrays[array] = np.load(path, mmap_mode="r", allow_pickle=False)
            return CachedArrays(arrays, tuple(files))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError, SyntaxError, LookupError, TypeError, AttributeError) as error:
            log.warning("the index cache entry %s/%s is damaged (%s); it is built again", self.folder, name, error)
            return None

    def _store(self, name: str, text: str, arrays: Arrays) -> None:
        entry: dict[str, Any] = {"key": json.loads(text), "arrays": {}}
        for array, values in arrays.items():
            path = self.folder / f"{name}-{array}.npy"
            with atomic_write_by_any(path) as stream:
                np.save(stream, values, allow_pickle=False)
            entry["arrays"][array] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        with atomic_write_by_any(self.folder / f"{name}.json") as stream:
            stream.write(json.dumps(entry, indent=1).encode())

    @contextlib.contextmanager
    def _only_builder(self, name: str) -> Iterator[None]:
        """Waits for other builders of the same entry; it spares work and memory, correctness does not need it."""
        with open_kept(self.folder / f".{name}.lock") as stream:
            with contextlib.suppress(OSError):  # a file system without locks
                take(stream, math.inf)
                sign(stream)
            yield
