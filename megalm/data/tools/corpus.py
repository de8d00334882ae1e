"""`megalm corpus`: real text that every machine with Python has, as JSON lines, for trials without a download.

Taken as far as the size allows, good prose first: the language reference in pydoc's topics, the docstrings of the
standard library, its sources, its tests. Written in an order that mixes them, module by module, because a split by
position must find the same mix everywhere. The same Python installation gives the same file, byte for byte.
"""

import argparse
import ast
import hashlib
import inspect
import json
import platform
import sysconfig
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megalm import __version__
from megalm.config.paths import path_argument
from megalm.config.ranges import Range
from megalm.data.indexed.manifest import manifest_bytes, read_manifest
from megalm.errors import DataError
from megalm.storage.atomic import atomic_write
from megalm.storage.durable import sha256_of

EXCLUDED = ("site-packages", "dist-packages", "lib-dynload", "encodings", "topics.py", "_sysconfigdata", "config-")
"""Starts of file and folder names: other packages, tables of characters, the topics as a source, and what is written
when Python is built, with the paths of one machine."""
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `megalm corpus`."""
    parser.description = (
        "Write the text of Python's own library (language reference, docstrings, sources) as JSON lines."
    )
    parser.add_argument(
        "--output",
        required=True,
        type=path_argument,
        metavar="F.jsonl",
        help='File to write: {"text", "source"} per line.',
    )
    parser.add_argument(
        "--size-mb",
        type=Range(0, 1e9, whole=False),
        default=20.0,
        help="Stop before this size (default: %(default)s MB).",
    )


def run(arguments: argparse.Namespace) -> int:
    """Writes the corpus, or says that it is up to date.

    Raises:
        DataError: a size that is not positive, or a file that cannot be written.
    """
    output, size_mb = Path(arguments.output), float(arguments.size_mb)
    if size_mb <= 0:
        raise DataError(f"--size-mb {size_mb} must be positive; 20 gives most of the library")
    request = {"megalm": __version__, "python": platform.python_version(), "size_mb": size_mb}
    if is_up_to_date(output, request):
        print(f"{output} is up to date")
        return 0
    chosen = choose(documents(Path(sysconfig.get_path("stdlib"))), int(size_mb * 1e6))
    if not chosen:
        raise DataError(f"--size-mb {size_mb} is smaller than the first document; give 1 at least")
    content = b"".join(line for _, line in chosen)
    with atomic_write(output) as stream:
        stream.write(content)
    write_manifest(output, request, hashlib.sha256(content).hexdigest())
    print(f"{output}: {len(chosen):,} documents, {len(content) / 1e6:.1f} MB, Python {request['python']}")
    return 0


def choose(candidates: Iterable[tuple[str, str]], limit: int) -> list[tuple[str, bytes]]:
    """(source, JSON line) of the first `candidates` that fit `limit` bytes, in the order of the file.

    The order follows a hash of the module, so that all documents of one module stand together.
    """
    chosen, size = [], 0
    for source, text in candidates:
        line = (json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n").encode()
        size += len(line)
        if size > limit:
            break
        chosen.append((source, line))
    return sorted(chosen, key=lambda entry: (hashlib.sha256(entry[0].split(":")[0].encode()).digest(), entry[0]))


def documents(library: Path) -> Iterator[tuple[str, str]]:
    """(source, text) of every document, best first; `source` is relative to the library."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"pydoc_data/{name}:topic", topics[name].strip() + "\n"
    paths = _modules(library)
    modules = [path for path in paths if not _is_test(path, library)]
    for path in modules:
        if prose := docstrings(_read(path)):
            yield f"{path.relative_to(library).as_posix()}:docstrings", prose
    for path in [*modules, *(path for path in paths if _is_test(path, library))]:
        if text := _read(path):
            yield path.relative_to(library).as_posix(), text


def docstrings(source: str) -> str:
    """The docstrings of a module, its classes and functions, with a blank line between; "" when it has none."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node, clean=False) for node in _blocks(tree) if isinstance(node, kinds)]
    return "".join(inspect.cleandoc(text).strip() + "\n\n" for text in found if text and text.strip())


def _blocks(tree: ast.AST) -> Iterator[ast.AST]:
    """A module and all its statements in the order of `ast.walk`, which visits ten times as many expressions too."""
    waiting = deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        for name in ("body", "handlers", "cases", "orelse", "finalbody"):
            waiting.extend(getattr(node, name, ()))


def is_up_to_date(output: Path, request: dict[str, Any]) -> bool:
    """Whether `output` is what the manifest beside it says, made for the same request."""
    try:
        manifest = read_manifest(_manifest_of(output))
    except DataError:
        return False
    if manifest is None or manifest.get("request") != request or not output.is_file():
        return False
    return bool(sha256_of(output) == manifest.get("sha256"))


def write_manifest(output: Path, request: dict[str, Any], sha256: str) -> None:
    """Notes beside `output` what it was made for."""
    with atomic_write(_manifest_of(output)) as stream:
        stream.write(manifest_bytes({"request": request, "sha256": sha256}))


def _manifest_of(output: Path) -> Path:
    return output.with_name(output.name + ".manifest.json")


def _modules(library: Path) -> list[Path]:
    """The sources in fixed order."""
    paths = [path for path in library.rglob("*.py") if not _is_excluded(path.relative_to(library))]
    return sorted(paths, key=lambda path: path.relative_to(library).parts)


def _is_excluded(path: Path) -> bool:
    return any(part.startswith(EXCLUDED) for part in path.parts)


def _is_test(path: Path, library: Path) -> bool:
    return not TEST_FOLDERS.isdisjoint(path.relative_to(library).parts)


def _read(path: Path) -> str:
    """The text of a module; "" for an empty one and for the few that are not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""
