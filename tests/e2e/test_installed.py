"""What is in the wheel is enough: built from the source distribution and installed where no checkout is, it trains."""

import json
import os
import shlex
import site
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import megalm
from megalm.kernels.building.places import find_cxx
from megalm.shipped import FOLDERS
from megalm.testing.processes import BIN, REPOSITORY, copy_repository, environment, free_port, run
from megalm.testing.small_runs import losses

pytestmark = pytest.mark.e2e
SMALL = """
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --global-batch-size 8
    --train-iters 3 --eval-iters 1 --log-interval 1
"""


@dataclass
class Installation:
    """A virtual environment with megalm from a wheel, and an empty folder to work in."""

    environment: Path
    folder: Path

    def __call__(self, *command: str | Path) -> str:
        """Run a command of this environment in the folder; what it printed."""
        variables = {name: value for name, value in environment().items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        program = self.environment / "bin" / str(command[0])
        path = f"{program.parent}:{os.environ['PATH']}"
        done = run(program, *command[1:], cwd=self.folder, environ={**variables, "PATH": path})
        assert done.code == 0, f"{shlex.join(map(str, command))}\n{done.output}"
        return done.output.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel from a source distribution from the repository's files, without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    copy_repository(source)
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    packed = run(sys.executable, "-c", code, folder, cwd=source)
    assert packed.code == 0, packed.output
    (sdist,) = folder.glob("*.tar.gz")
    offline = ("--quiet", "--no-cache-dir", "--no-deps", "--no-index", "--no-build-isolation")
    built = run(sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", folder, sdist, cwd=folder)
    assert built.code == 0, built.output
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The wheel in a fresh environment, which borrows all other packages from this one."""
    place = tmp_path_factory.mktemp("installed")
    venv.create(place / "venv", with_pip=False)
    python = place / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    done = run(*pip, cwd=place)
    assert done.code == 0, done.output
    # a folder that a .pth file adds has its own .pth files ignored, and so the editable megalm in it
    (packages,) = (place / "venv/lib").glob("python*/site-packages")
    (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    launcher = (BIN / "deepspeed").read_text().partition("\n")[2]
    (python.parent / "deepspeed").write_text(f"#!{python}\n{launcher}")
    (python.parent / "deepspeed").chmod(0o755)
    folder = place / "work"
    folder.mkdir()
    return Installation(place / "venv", folder)


def commands(installed: Installation, *given: list[str | Path]) -> list[str]:
    """What each command of `megalm` printed; all in one process, which imports torch once."""
    code = (
        "import json, sys; from megalm.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    if main(words): sys.exit(f'{words} failed')\n"
        "    print('\\f')"
    )
    words = json.dumps([[str(word) for word in command] for command in given])
    return installed("python", "-c", code, words).split("\f")[: len(given)]


def test_the_wheel_holds_modules_sources_recipes_and_the_licence(wheel: Path) -> None:
    assert wheel.name == f"megalm-{megalm.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    listed = subprocess.run(
        ["git", "ls-files", "megalm", *FOLDERS], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    paths = [name for name in listed if (REPOSITORY / name).is_file()]
    expected = {path if path.startswith("megalm/") else f"megalm/_shipped/{path}" for path in paths}
    assert expected <= names
    assert {name for name in names - expected if ".dist-info/" not in name} <= untracked()
    assert f"megalm-{megalm.__version__}.dist-info/licenses/LICENSE" in names


def untracked() -> set[str]:
    """Files that a developer has not added yet: they are in a wheel too."""
    new = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard", "megalm"], cwd=REPOSITORY, capture_output=True, text=True
    )
    return set(new.stdout.splitlines())


@pytest.mark.timeout(600)
def test_from_text_to_a_trained_model_without_a_checkout(installed: Installation) -> None:
    inside = installed.environment.resolve()
    code = "import megalm; print(megalm.__file__)"
    assert Path(installed("python", "-c", code).splitlines()[-1]).is_relative_to(inside)
    shipped = Path(installed("megalm", "shipped"))
    assert shipped.is_relative_to(inside)
    job = [
        "--config", shipped / "launch/recipes/quickstart.yaml", "--deepspeed_config", shipped / "ds_configs/zero2.json",
        "--data-path", "corpus_text_document", "--tokenizer-model", "tok.model", *SMALL.split(), "--save", "run",
    ]  # fmt: skip
    asked = ["--ntasks-per-node", "2", "--time", "10", "--site", shipped / "launch/slurm/site.yaml"]
    built, _, _, _, plan, script = commands(
        installed,
        ["kernels", "build"] if find_cxx() is not None else ["shipped"],
        ["corpus", "--output", "corpus.jsonl", "--size-mb", "1"],
        ["train-tokenizer", "--input", "corpus.jsonl", "--output-prefix", "tok", "--vocab-size", "500"],
        [
            "preprocess", "--input", "corpus.jsonl", "--output-prefix", "corpus", "--tokenizer-type",
            "GPTSentencePieceTokenizer", "--tokenizer-model", "tok.model", "--append-eod",
        ],
        ["plan", "--world-size", "2", *job],
        ["submit", *asked, *job, "--dry-run"],
    )  # fmt: skip
    assert find_cxx() is None or "kernels: fused" in built
    assert "layout  world 2 = " in plan
    assert f"{installed.environment}/bin/python -u -m megalm.pretrain_gpt" in script

    port = str(free_port())
    command = ["deepspeed", "--num_accelerators", "2", "--master_port", port, "--module", "megalm.pretrain_gpt"]
    said = installed(*command, *job)
    assert "ZeRO 2" in said
    assert sorted(losses(installed.folder / "run")) == [1, 2, 3]
