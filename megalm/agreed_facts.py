"""What all ranks of a run must have in common, as each rank finds it by itself before it meets the others.

A file that a rank cannot read is a fact as well: it differs from the others', or the run ends where the file is used.
"""

import hashlib
import importlib.util
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import megalm
from megalm.config.output import hugging_face_folder
from megalm.config.sections import RunConfig
from megalm.continuation import start_place
from megalm.data.samples.build import open_dataset
from megalm.distillation import find_teacher
from megalm.distributed.agreement import Facts
from megalm.distributed.environment import variables_to_agree_on
from megalm.errors import MegalmError
from megalm.kernels.building.places import SOURCES

_PACKAGES = ("torch", "deepspeed", "numpy", "safetensors", "sentencepiece", "tokenizers", "tiktoken", "mpi4py")
_DATA_PATHS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
_TOKENIZER_FILES = ("tokenizer_model", "vocab_file", "merge_file")


def agreed_facts(config: RunConfig, sources: dict[str, str], world_size: int, device: str) -> Facts:
    """The facts of this rank, none if it is the only one; `sources` says where settings come from (`recipe.yaml:4`)."""
    if world_size == 1:
        return Facts({})
    settings = {name: value for fields in config.agreed().values() for name, value in fields.items()}
    variables = {f"the variable {name}": value for name, value in variables_to_agree_on().items()}
    facts = settings | _software(config) | _inputs(config) | variables
    return Facts(facts | {"the number of ranks": world_size, "the device": device}, sources)


def _software(config: RunConfig) -> dict[str, Any]:
    """Versions and code."""
    modules = config.extensions.import_module
    return {
        "the version of python": platform.python_version(),
        **{f"the version of {package}": _version(package) for package in _PACKAGES},
        "the version of megalm": f"{megalm.__version__}, code {_hash_of_folder(Path(megalm.__file__).parent, '*.py')}",
        "the kernels' sources": _hash_of_folder(SOURCES, "*"),
        **{f"the code of {module}": _or_error(_code_of, module) for module in modules},
    }


def _inputs(config: RunConfig) -> dict[str, Any]:
    """Data, tokenizer and checkpoint, by what is in them."""
    blends = (config.data.blend(name) for name in _DATA_PATHS)
    prefixes = dict.fromkeys(prefix for blend in blends if blend for prefix in blend.prefixes)
    files = [path for name in _TOKENIZER_FILES if (path := getattr(config.tokenizer, name)) is not None]
    return {
        **{f"the data of {prefix}": _or_error(_fingerprint, prefix) for prefix in prefixes},
        **{f"the tokenizer {path}": _or_error(_content_of, Path(path)) for path in files},
        "the checkpoint to start from": _or_error(_start_of, config),
        **({"the teacher": _or_error(_teacher_of, config)} if config.distillation.teacher_load else {}),
    }


def _or_error(find: Callable[[Any], str], what: Any) -> str:
    try:
        return find(what)
    except (MegalmError, OSError, ImportError, ValueError) as error:
        return f"none: {error}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _fingerprint(prefix: str) -> str:
    return f"SHA-256 {open_dataset(prefix, scan=False).fingerprint()[:16]}"


def _content_of(path: Path) -> str:
    if path.is_dir():
        return f"SHA-256 {_hash_of_folder(path, '*')}"
    return f"SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def _code_of(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return "none"
    origin = Path(spec.origin)
    return _hash_of_folder(origin.parent, "*.py") if spec.submodule_search_locations else _content_of(origin)


def _start_of(config: RunConfig) -> str:
    """Which checkpoint, by its name and its manifest; where it lies may differ."""
    origin, same_run = start_place(config)
    if origin is None:
        return "none"
    return _weights_of(origin, is_foreign=not same_run and hugging_face_folder(config.checkpoint.load) is not None)


def _teacher_of(config: RunConfig) -> str:
    found = find_teacher(config)
    assert found is not None, "asked of runs with a teacher"
    return _weights_of(found.folder, is_foreign=found.is_hugging_face)


def _weights_of(origin: Path, *, is_foreign: bool) -> str:
    """A checkpoint, or a model folder of transformers."""
    if is_foreign:
        sizes = sorted((path.name, path.stat().st_size) for path in origin.iterdir() if path.is_file())
        return f"{origin.name}, config.json {_content_of(origin / 'config.json')}, sizes {sizes}"
    return f"{origin.name}, manifest {_content_of(origin / 'manifest.json')}"


def _hash_of_folder(folder: Path, pattern: str) -> str:
    """Of all files in it, by their places in the folder and their content."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob(pattern) if path.is_file() and "__pycache__" not in path.parts):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
