"""What is mapped into memory must stay as long as it was: to read beyond the end of a mapped file kills the process."""

import os
import weakref
from collections.abc import Iterable

from megalm.errors import DataError


class WholeFile:
    """A file held open beside the map of it, to see in a microsecond that it was not cut; picklable (opened again).

    A file that was replaced under its name is still whole: the map is of what was opened.

    Raises:
        OSError: as `open`.
    """

    def __init__(self, path: str | os.PathLike[str], advice: str) -> None:
        self._path, self._advice = os.fspath(path), advice
        self.handle = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        """Its file descriptor."""
        weakref.finalize(self, os.close, self.handle)
        self._size = os.fstat(self.handle).st_size

    def require(self) -> None:
        """Returns when the file is as long as it was; before each look at the map.

        Raises:
            DataError: it has become shorter.
        """
        if os.lseek(self.handle, 0, os.SEEK_END) < self._size:  # a third of the time of fstat
            raise DataError(f"{self._path} was cut while in use; {self._advice}")

    def __reduce__(self) -> tuple[type["WholeFile"], tuple[str, str]]:
        return type(self), (self._path, self._advice)


def require_whole(files: Iterable[WholeFile]) -> None:
    """`WholeFile.require` of each."""
    for file in files:
        file.require()
