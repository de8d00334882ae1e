"""Puts the files that megalm ships beside its modules into the package; all else stands in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("csrc", "ds_configs", "launch")


class BuildWithShipped(build_py):
    """The modules, and beside them the folders that megalm.shipped finds; an editable install uses the checkout's."""

    def run(self) -> None:
        """Build into an empty folder: a file that has left the checkout leaves the wheel."""
        if self.editable_mode:
            super().run()
            return
        package = Path(self.build_lib, "megalm")
        shutil.rmtree(package, ignore_errors=True)
        super().run()
        for name in SHIPPED:
            shutil.copytree(name, package / "_shipped" / name, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithShipped})
