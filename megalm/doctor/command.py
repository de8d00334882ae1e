"""`megalm doctor`: one page about a machine, or the ranks of a job; its exit code says whether training can work."""

import argparse
import textwrap
from collections.abc import Iterable
from pathlib import Path

from megalm.config.paths import path_argument
from megalm.doctor.machine import Row, machine_rows
from megalm.errors import MegalmError, PlatformError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--ranks and --folder."""
    parser.add_argument(
        "--ranks",
        action="store_true",
        help="look at the ranks of a job together: srun megalm doctor --ranks, or the same under mpirun or torchrun",
    )
    parser.add_argument(
        "--folder",
        type=path_argument,
        default=".",
        metavar="DIR",
        help="where runs will be saved (default: this folder)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the page; 0, or the exit code of a platform error if a row says FAIL.

    Raises:
        PlatformError: the ranks do not find each other.
    """
    folder = Path(arguments.folder).absolute()
    if not arguments.ranks:
        rows = machine_rows(folder)
        print(page("megalm doctor", rows))
        return verdict(rows)
    from megalm.distributed.environment import read_environment
    from megalm.doctor.ranks import rank_rows

    environment = read_environment()
    try:
        rows = rank_rows(environment, folder)
    except MegalmError as error:
        if environment.rank and not error.local:
            return error.exit_code  # rank 0 says it
        raise
    if environment.is_first:
        local = [row for row in machine_rows(folder) if row.name != "folder"]
        print(page(f"megalm doctor: {environment.world_size} ranks by {environment.launcher}", rows), flush=True)
        print(page("the machine of rank 0", local), flush=True)
        rows += local
    return verdict(rows)


def page(title: str, rows: Iterable[Row]) -> str:
    """The rows as text, the problems under them."""
    lines = [title]
    for row in rows:
        indent = " " * 21
        text = textwrap.wrap(row.text, 118 - len(indent), break_long_words=False, break_on_hyphens=False) or [""]
        lines.append(f"  {row.mark:4} {row.name:13} {text[0]}".rstrip())
        lines += [indent + more for more in text[1:]]
        lines += [f"{indent}-> {row.problem}"] if row.problem else []
    return "\n".join(lines)


def verdict(rows: Iterable[Row]) -> int:
    """The exit code."""
    return PlatformError.exit_code if any(row.mark == "FAIL" for row in rows) else 0
