"""`megalm translate`: a shell script of Megatron or YAML of GPT-NeoX in, a recipe and a table of all settings out.

Scripts are read, never run.
"""

import argparse
from pathlib import Path

from megalm.config.paths import path_argument
from megalm.config.translation.megatron import from_shell
from megalm.config.translation.neox import from_yaml
from megalm.config.translation.table import Translation
from megalm.errors import ConfigError
from megalm.storage.faults import reason_of

LARGEST = 1 << 20
"""Bytes of a configuration."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `megalm translate`."""
    parser.add_argument(
        "files",
        nargs="+",
        type=path_argument,
        metavar="FILE",
        help="a shell script that starts Megatron-LM's or Megatron-DeepSpeed's training, or YAML files of GPT-NeoX, "
        "which are merged left to right",
    )
    parser.add_argument(
        "--output", type=path_argument, metavar="FILE", help="the recipe (default: FILE's name with .megalm.yaml, here)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the table, write the recipe; 0."""
    paths = [Path(word) for word in arguments.files]
    output = Path(arguments.output or paths[0].with_suffix(".megalm.yaml").name)
    if output.exists():
        raise ConfigError(f"{output} exists; give another --output")
    found = translate(paths)
    try:
        output.write_text(found.recipe(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written: {reason_of(error, output)}") from error
    print(found.table())
    print(f"recipe: {output}; see all of it with --config {output} --print-config")
    return 0


def translate(paths: list[Path]) -> Translation:
    """The translation of a script, or of NeoX's files together."""
    texts = [_text(path) for path in paths]
    scripts = [path for path, text in zip(paths, texts, strict=True) if _is_script(path, text)]
    if not scripts:
        return from_yaml(texts, " ".join(map(str, paths)))
    if len(paths) > 1:
        raise ConfigError(f"{scripts[0]} is a shell script; give it alone")
    return from_shell(texts[0], str(paths[0]))


def _is_script(path: Path, text: str) -> bool:
    return path.suffix in (".sh", ".bash", ".slurm", ".sbatch") or text.startswith("#!") or "pretrain_" in text


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST:
            raise ConfigError(f"{path} is larger than a configuration ({LARGEST >> 20} MiB)")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {reason_of(error, path)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read: {error.reason}") from error
