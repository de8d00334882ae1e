"""JSON and YAML that somebody else may have written: parsed, bounded and validated in one place.

Whatever a file holds, what comes out is a value of its schema or a DocumentError that says where it is wrong: no
RecursionError, no list of billions behind a few aliases, no key that silently counts only the second time.
"""

import functools
import json
import math
import os
import re
from collections.abc import Hashable
from typing import Annotated, Any, TypeVar, cast

import yaml
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

T = TypeVar("T")
AnyPath = str | os.PathLike[str]

MAX_DEPTH = 64
"""Lists and mappings inside each other."""
MAX_SETTINGS_BYTES = 1 << 19
"""Bytes of a file of settings: a device that never ends is no such file."""
MAX_YAML_VALUES = 10_000
"""Values in a YAML file, each alias counted as what it stands for: people write it, and its parser is slow."""
_MAX_DIGITS = 400
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
"""An escape that is half of a character unless its other half follows."""
STRICT = ConfigDict(strict=True)
"""Of a TypedDict that is a schema: no value is converted. Keys that it does not know are a later version's."""


class DocumentError(ValueError):
    """What is wrong with a file's content; `line` and `column` (from 1) where that is known."""

    def __init__(self, text: str, line: int | None = None, column: int | None = None) -> None:
        super().__init__(text)
        self.line, self.column = line, column


def _plain_name(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} is no plain file name")
    return name


PlainName = Annotated[str, AfterValidator(_plain_name)]
"""The name of a file in the folder of the document, and in no other."""
Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 63)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def read_settings(path: AnyPath) -> bytes:
    """The content of a file of settings, which a person wrote.

    Raises:
        OSError: it cannot be read.
        DocumentError: it is too large to be one.
    """
    with open(path, "rb") as stream:
        content = stream.read(MAX_SETTINGS_BYTES + 1)
    if len(content) > MAX_SETTINGS_BYTES:
        raise DocumentError(f"it has more than {MAX_SETTINGS_BYTES // 1024} kB; a file of settings is smaller")
    return content


def parse_json(content: str | bytes, *, repeats: bool = False) -> Any:
    """The value of a JSON text, by the letter of the standard: finite numbers, whole characters, each key once.

    Args:
        repeats: a key may stand twice, and its last value counts (who allows it looks for them itself).

    Raises:
        DocumentError: it is none, or goes deeper than MAX_DEPTH.
    """
    try:
        text = content if isinstance(content, str) else content.decode()
        value = json.loads(
            text,
            object_pairs_hook=None if repeats else _each_key_once,
            parse_constant=_not_json,
            parse_float=_finite,
        )
        if _HALF_CHARACTER.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise DocumentError(f"not JSON: {error.msg}", error.lineno, error.colno) from None
    except UnicodeError as error:
        raise DocumentError(f"not UTF-8: {error.reason}" if hasattr(error, "reason") else "not UTF-8") from None
    except RecursionError:
        raise _too_deep() from None
    except DocumentError:
        raise
    except ValueError as error:  # digits without end
        raise DocumentError(f"not JSON: {error}") from None
    _check_depth(value)
    return value


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise DocumentError(f'"{next(key for key in keys if keys.count(key) > 1)[:100]}" stands twice')
    return found


def _not_json(word: str) -> None:
    raise DocumentError(f"{word} is not a JSON number; give a finite number")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise DocumentError(f"{text[:40]} is too large a number")
    return value


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [part for part in level if isinstance(part, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_deep()
        level = [part for parts in level for part in (parts.values() if isinstance(parts, dict) else parts)]


def _too_deep() -> DocumentError:
    return DocumentError(f"lists and mappings lie more than {MAX_DEPTH} deep inside each other")


class BoundedLoader(yaml.SafeLoader):
    """YAML without code, which gives up early on what is too deep or too much."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values, self._depth = 0, 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node of the text; PyYAML calls it for each."""
        self._values, self._depth = self._values + 1, self._depth + 1
        if self._depth > MAX_DEPTH:
            raise _too_deep()
        if self._values > MAX_YAML_VALUES:
            raise _too_many(self.line + 1)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A whole number, if a number of so many digits can be meant."""
        if len(node.value) > _MAX_DIGITS:
            raise DocumentError(f"a number has {len(node.value)} digits", node.start_mark.line + 1)
        return int(super().construct_yaml_int(node))


BoundedLoader.add_constructor("tag:yaml.org,2002:int", BoundedLoader.construct_yaml_int)


def parse_yaml(content: bytes, loader_class: type[BoundedLoader] = BoundedLoader) -> tuple[yaml.Node | None, Any]:
    """The nodes (with their lines) and the value of a YAML text; None and None of an empty one.

    Raises:
        DocumentError: it is none, deeper than MAX_DEPTH, or its aliases stand for too much.
    """
    try:
        loader = loader_class(content.decode())
        try:
            node = loader.get_single_node()
            if node is None:
                return None, None
            _count(node, 0, {})
            return node, loader.construct_document(node)
        finally:
            loader.dispose()
    except DocumentError:
        raise
    except UnicodeDecodeError as error:
        raise DocumentError(f"not UTF-8: {error.reason}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = (mark.line + 1, mark.column + 1) if mark else (None, None)
        raise DocumentError(f"not YAML: {error.problem or error.context}", *where) from None
    except yaml.YAMLError as error:
        raise DocumentError(f"not YAML: {getattr(error, 'reason', error)}") from None
    except RecursionError:
        raise _too_deep() from None
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:  # !!timestamp soon
        raise DocumentError(f"a value is not what its tag or form says: {error}") from None


def _count(node: yaml.Node, depth: int, known: dict[int, int | None]) -> int:
    """How many values a node stands for, aliases included."""
    if depth > MAX_DEPTH:
        raise _too_deep()
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise DocumentError("an alias stands inside of what it stands for", node.start_mark.line + 1)
        return count
    known[id(node)] = None
    inside = list(node.value) if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        inside = [part for pair in node.value for part in pair]
    count = 1 + sum(_count(part, depth + 1, known) for part in inside)
    if count > MAX_YAML_VALUES:
        raise _too_many(node.start_mark.line + 1)
    known[id(node)] = count
    return count


def _too_many(line: int) -> DocumentError:
    return DocumentError(f"it stands for more than {MAX_YAML_VALUES} values", line)


@functools.cache
def _adapter(schema: Hashable) -> TypeAdapter[Any]:
    return TypeAdapter(cast(Any, schema))


def validated(schema: type[T], value: Any) -> T:
    """`value` as one of `schema`: anything that pydantic can check, such as a TypedDict with STRICT.

    Raises:
        DocumentError: the first place where it is none.
    """
    try:
        checked: T = _adapter(cast(Hashable, schema)).validate_python(value)
        return checked
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:100] for part in first["loc"])
        raise DocumentError(f"{where}: {first['msg']}" if where else first["msg"]) from None
