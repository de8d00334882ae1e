"""Which files the words of --input stand for."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megalm.data.text.compression import COMPRESSIONS
from megalm.data.text.formats import FORMATS, STDIN, format_of
from megalm.errors import DataError
from megalm.storage.faults import reading

_NOT_INPUT = ".manifest.json"
"""End of names that stand beside datasets."""
_ABOUT = frozenset(
    """dataset_info.json dataset_infos.json dataset_dict.json state.json config.json generation_config.json license.txt
    readme.txt requirements.txt special_tokens_map.json tokenizer.json tokenizer_config.json vocab.json
    merges.txt""".split()  # noqa: SIM905 (readable)
)
"""Names in a folder, such as a clone from a hub, that are about its data and hold none."""


@dataclass
class Inputs:
    """Files in order."""

    files: list[str] = field(default_factory=list)
    """Files to read, and "-"."""
    left_out: list[str] = field(default_factory=list)
    """Files in the folders and patterns whose names tell no format, or that they are about the others."""


def expand(words: Iterable[str]) -> Inputs:
    """The files that `words` stand for: files, "-", folders (all files of a known kind in them), patterns.

    What is hidden in a folder (a name that begins with a dot), or beside a dataset, is not looked at.

    Raises:
        DataError: a folder or pattern without such files, or a file that is named twice.
    """
    found = Inputs()
    for word in words:
        if os.path.isdir(word):
            with reading(word, DataError, "give this process the right to read it, or name the files"):
                _add(sorted(_visible(word)), f"the folder {word}", found)
        elif glob.has_magic(word) and not os.path.exists(word):
            with reading(word, DataError, "give this process the right to read it, or name the files"):
                _add(sorted(_matching(word)), f"the pattern {word}", found)
        else:
            found.files.append(word)
    if twice := [path for path, count in Counter(map(os.path.realpath, found.files)).items() if count > 1]:
        name = next(path for path in found.files if os.path.realpath(path) == twice[0])
        raise DataError(f"--input names {name} twice; name each file once")
    return found


def _visible(folder: str) -> Iterator[str]:
    """The files in a folder and the folders inside of it, but for hidden ones.

    Raises:
        OSError: one of the folders cannot be read.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _visible(entry.path)
            else:
                yield os.path.join(folder, entry.name)


def _matching(pattern: str) -> list[str]:
    """What a pattern stands for.

    Raises:
        OSError: nothing, because the folder before its first wildcard cannot be read.
    """
    found = glob.glob(pattern, recursive=True)
    if not found:
        parts = Path(pattern).parts
        first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
        folder = Path(*parts[:first])
        if folder.is_dir():
            os.listdir(folder)
    return found


def _add(paths: list[str], where: str, found: Inputs) -> None:
    candidates = [
        path for path in paths if os.path.isfile(path) and not path.endswith(_NOT_INPUT) and ".parts/" not in path
    ]
    known = [path for path in candidates if _tells_format(path) and Path(path).name.lower() not in _ABOUT]
    if not known:
        raise DataError(
            f"{where} holds no input; files must end in {', '.join(FORMATS)}, or these with {' or '.join(COMPRESSIONS)}"
        )
    found.files += known
    found.left_out += [path for path in candidates if path not in set(known)]


def _tells_format(path: str) -> bool:
    try:
        format_of(path)
    except DataError:
        return False
    return path != STDIN
