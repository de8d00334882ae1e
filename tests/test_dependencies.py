"""Every package that megalm imports stands in pyproject.toml: in `dependencies`, or, if imported late, in an extra."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import megalm

ROOT = Path(megalm.__file__).parent
DISTRIBUTIONS = {"yaml": "pyyaml"}
"""Import name -> name on the index, where they differ by more than - and _."""
NOT_ON_THE_INDEX = {"apex", "amp-c"}
"""NVIDIA Apex is installed from its source; megalm looks for it and does without."""
TOOLS = {"bench", "dev"}
"""Extras that are not for using megalm."""


def declared(requirements: Iterable[str]) -> set[str]:
    return {re.split(r"[^\w.-]", text)[0].lower().replace("_", "-") for text in requirements}


def imported(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """(distribution, whether importing the file imports it) of every third-party import, `import_module` included."""
    late = {
        id(node)
        for scope in ast.walk(tree)
        if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef) or is_for_types(scope)
        for node in ast.walk(scope)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [str(node.module)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "find_spec")):
            words = [part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)]
            names = [word for word in words if isinstance(word, str)][:1]
        roots = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"megalm"}
        yield from ((DISTRIBUTIONS.get(root, root.lower().replace("_", "-")), id(node) not in late) for root in roots)


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = declared(project["dependencies"])
    extras = {
        name
        for extra, requirements in project["optional-dependencies"].items()
        if extra not in TOOLS
        for name in declared(requirements)
    }
    missing = []
    for path in sorted(ROOT.rglob("*.py")):
        for name, at_once in imported(ast.parse(path.read_text(encoding="utf-8"))):
            if name not in needed and (at_once or name not in extras | NOT_ON_THE_INDEX):
                missing.append(f"{path.relative_to(ROOT.parent)} imports {name}")
    assert missing == []


def test_every_kind_of_import_is_seen() -> None:
    source = """
import os, psutil, megalm.cli
from yaml import nodes
from . import sibling
if TYPE_CHECKING:
    import zstandard
def late():
    from detect_secrets.plugins import base
    importlib.import_module(f"nltk.{name}")
"""
    assert set(imported(ast.parse(source))) == {
        ("psutil", True), ("pyyaml", True), ("zstandard", False), ("detect-secrets", False), ("nltk", False),
    }  # fmt: skip
