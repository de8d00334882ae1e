"""The layers: every import in megalm points downwards, deferred and TYPE_CHECKING ones included; no circles."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import megalm

ROOT = Path(megalm.__file__).parent
L0 = {"errors", "waiting", "randomness", "processes", "secrets", "storage", "config", "tables", "shipped"}
L1 = {"kernels", "distributed", "monitor"}
L2 = {"data", "objectives", "models"}
L3 = {"parallel", "engine", "checkpoint", "resilience", "launching", "doctor"}
TOP = (
    "pretrain_gpt",
    "pretrain_bert",
    "pretrain_t5",
    "entry",
    "preparation",
    "agreed_facts",
    "training",
    "evaluation",
    "run_summary",
    "assembly",
    "bad_steps",
    "run",
    "continuation",
    "run_state",
    "distillation",
    "cli",
    "commands",
    "planner",
)
"""What lies above the layers: each may import those after it, and everything below."""
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "randomness": set(),
    "processes": set(),
    "secrets": set(),
    "waiting": set(),
    "storage": {"errors", "waiting"},
    "shipped": set(),
    "config": {"errors", "secrets", "storage", "shipped"},
    "tables": {"errors", "config"},
    **dict.fromkeys(L1, L0),
    **{part: L0 | {"kernels"} for part in L2},
    **dict.fromkeys(L3, L0 | L1 | L2),
    **{part: L0 | L1 | L2 | L3 | set(TOP[number + 1 :]) for number, part in enumerate(TOP)},
    "testing": {path.stem for path in ROOT.iterdir()},
}
"""Part of megalm -> the other parts that it may import."""
TEXTS = {"sentencepiece", "tokenizers", "tiktoken", "gigatoken", "zstandard", "pyarrow"}
FILTERS = {"ftfy", "nltk", "detect_secrets", "phonenumbers"}
THIRD_PARTY: dict[str, set[str]] = {
    "storage": {"pydantic", "yaml"},
    "config": {"pydantic", "yaml"},
    "kernels": {"torch", "numpy", "apex"},
    "distributed": {"torch", "torch.distributed", "psutil", "mpi4py"},
    "monitor": {"torch"},
    "data": {"torch", "numpy", "pydantic", "mpi4py", *TEXTS, *FILTERS},
    "objectives": {"numpy"},
    "models": {"torch"},
    "parallel": {"torch", "torch.distributed"},
    "engine": {"torch", "torch.distributed", "deepspeed"},
    "checkpoint": {"torch", "torch.distributed", "safetensors", "pydantic", "typing_extensions"},
    "resilience": {"psutil"},
    "launching": {"pydantic"},
    "doctor": {"torch", "torch.distributed", "psutil"},
    **{part: {"torch", "torch.distributed"} for part in (*TOP, "testing")},
    "commands": {"torch", "transformers"},
}
"""Part of megalm -> the libraries beyond Python's own that it may import; what is not named may import none."""
FILES = sorted(ROOT.rglob("*.py"))


def part_of(path: Path) -> str:
    """`engine` of megalm/engine/build.py, `training` of megalm/training.py."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(parsed(path))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything in megalm that a file imports, by statement or by name (`import_module`)."""
    package = ("megalm", *path.relative_to(ROOT).parent.parts)
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and is_module(node.value):
            names = [node.value]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "megalm")


def is_module(text: str) -> bool:
    """Whether a string names a module of megalm, as a table for `import_module` would."""
    parts = text.split(".")
    place = ROOT.joinpath(*parts[1:])
    return parts[0] == "megalm" and len(parts) > 1 and (place.with_suffix(".py").is_file() or place.is_dir())


def upward_imports(path: Path, own: str) -> list[str]:
    """Imports of a file of part `own` that its layer forbids."""
    found = []
    for line, name in imported(path):
        part = (*name.split("."), "")[1]
        inside = {place.stem for place in ROOT.iterdir()}
        if part in inside and part != own and own in MAY_IMPORT and part not in MAY_IMPORT[own]:
            found.append(f"{path.relative_to(ROOT.parent)}:{line} ({own}) imports {name}")
    return found


def test_every_part_has_a_layer() -> None:
    parts = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert parts - {"__init__"} == set(MAY_IMPORT), "each part of megalm has its line in MAY_IMPORT"


def test_imports_point_downwards() -> None:
    assert [text for path in FILES for text in upward_imports(path, part_of(path))] == []


def module_of(path: Path) -> str:
    """`megalm.engine.build` of megalm/engine/build.py, `megalm.engine` of its __init__.py."""
    parts = ("megalm", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """The files of a circle of imports, if there is one."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_files_import_each_other_in_a_circle() -> None:
    modules = {module_of(path): path for path in FILES}
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for _, target in imported(path):
            while target not in modules:
                target = target.rpartition(".")[0]
            if target != name:
                graph[name].add(target)
    assert circle(graph) == []
    assert len(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == 4  # the first stands at the end again


def test_each_part_keeps_to_its_libraries() -> None:
    found = []
    for path in FILES:
        allowed = THIRD_PARTY.get(part_of(path), set())
        for node in nodes(path):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                root = "torch.distributed" if name.startswith("torch.distributed") else name.split(".")[0]
                if root not in sys.stdlib_module_names and root != "megalm" and root not in allowed:
                    found.append(f"{path.relative_to(ROOT.parent)}:{node.lineno} imports {name}")
    assert found == []


@pytest.mark.parametrize(
    ("own", "source"),
    [
        ("distributed", "import megalm.monitor.logger"),
        ("monitor", "def f():\n    from megalm.distributed import mesh"),
        ("data", "from megalm import distributed"),
        ("models", "if TYPE_CHECKING:\n    from megalm.distributed.mesh import Mesh"),
        ("data", "from ..models import gpt"),
        ("engine", "from megalm.checkpoint import reader"),
        ("config", "import_module('megalm.data.loader')"),
        ("checkpoint", "import json, megalm.training"),
        ("errors", "from megalm.storage.durable import sha256_of"),
    ],
)
def test_the_test_sees_every_kind_of_import(
    own: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / own / "sample.py"
    path.parent.mkdir()
    path.write_text(source)
    for entry in ROOT.iterdir():
        (tmp_path / entry.name).mkdir(exist_ok=True) if entry.is_dir() else (tmp_path / entry.name).touch()
    (tmp_path / "data" / "loader.py").touch()
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert len(upward_imports(path, own)) == 1


def test_nothing_that_runs_needs_what_tests_share() -> None:
    assert [str(path) for path in FILES for _, name in imported(path) if name.split(".")[1:2] == ["testing"]
            and part_of(path) != "testing"] == []  # fmt: skip


def test_there_are_no_global_statements() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        for node in nodes(path)
        if isinstance(node, ast.Global)
    ]
    assert found == []


LENGTHS = {"assembly.py": 120, "training.py": 250}
"""How a run is put together, and its loop: each read at one sitting."""


def test_functions_and_the_way_of_a_run_stay_short() -> None:
    functions = ((path, node) for path in FILES for node in nodes(path) if isinstance(node, ast.FunctionDef))
    long = [f"{path.relative_to(ROOT)}: {f.name}" for path, f in functions if (f.end_lineno or 0) - f.lineno >= 60]
    assert long == []
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in LENGTHS}
    assert {name: lines[name] for name, limit in LENGTHS.items() if lines[name] > limit} == {}


ENVIRON = {"environ", "environb", "getenv", "putenv", "unsetenv"}


def test_the_environment_is_read_in_one_place() -> None:
    found = set()
    for path in FILES:
        for node in nodes(path) if part_of(path) != "testing" else ():
            attribute = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
            by_name = isinstance(node, ast.ImportFrom) and node.module == "os"
            names = {node.attr} if attribute else {alias.name for alias in node.names} if by_name else set()
            if names & ENVIRON:
                found.add(str(path.relative_to(ROOT)))
    assert found == {"distributed/environment.py"}


@pytest.mark.parametrize("module", ["megalm", "megalm.cli", "megalm.entry", "megalm.config.merging.load"])
def test_what_answers_before_training_does_not_wait_for_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'deepspeed', 'numpy', 'tensorboard'}} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
