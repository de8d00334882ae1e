"""What comes with megalm beside its modules: the kernels' sources, DeepSpeed JSONs, recipes and launch scripts.

A checkout has them at its top. A wheel carries them inside the package, where setup.py puts them.
"""

import argparse
from pathlib import Path

FOLDERS = ("csrc", "ds_configs", "launch")
"""What is shipped; setup.py has the same names."""


def shipped_folder() -> Path:
    """The folder that holds FOLDERS: in the package where it was installed from a wheel, else the checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "_shipped"
    return installed if installed.is_dir() else package.parent


def shipped_file(path: str) -> str | None:
    """The file that megalm ships as `path` (ds_configs/zero1.json); None if it ships none of that name."""
    shipped = shipped_folder() / path
    return str(shipped) if path.partition("/")[0] in FOLDERS and shipped.is_file() else None


def shipped_hint(path: str) -> str:
    """What to add to the message that there is no file `path`: where the one is that megalm ships, or ""."""
    shipped = shipped_file(path)
    if shipped is None or Path(path).exists():
        return ""
    return f"; give {shipped}, which comes with megalm, or copy it here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`megalm shipped` has no flags."""
    parser.epilog = "To change them, copy them: cp -r $(megalm shipped)/{launch,ds_configs} ."


def run(arguments: argparse.Namespace) -> int:
    """Print the folder."""
    print(shipped_folder())
    return 0
