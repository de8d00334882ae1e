"""Every command of the README and docs/ runs, in the order of the text, in a copy of the repository.

`make test` leaves the two pages of LATER to `make test-long`: that their commands and flags exist is tested in
test_texts.py, and runs of their families in test_objective_runs.py and models/.

The first command of each program (make, which calls deepspeed, megalm, python) is typed into a shell as it stands;
torchrun's is in test_pretrain.py. What follows of the programs that are ours runs in warm processes, with the same
words.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megalm.kernels.building.places import find_cxx
from megalm.testing import warm
from megalm.testing.processes import REPOSITORY, Finished, copy_repository, environment, run

pytestmark = pytest.mark.e2e

DOCUMENTS = ["README.md", *sorted(str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / "docs").glob("*.md"))]
LATER = ["docs/encoders.md", "docs/encoder_decoders.md"]
LIMIT_S = 600
"""Of one command, on a machine that is busy otherwise."""
SMALLER = "--hidden-size 64 --seq-length 64"
SHORTER = f"{SMALLER} --train-iters 4 --eval-iters 1 --log-interval 1"
SERVERS = ("tensorboard",)
SELF = ("make test", "make lint")
NEEDS_COMPILER = ("megalm kernels build",)
"""Without a C++ compiler these end with the one line that says so."""


def commands(document: str) -> list[str]:
    """The lines of a document's ```bash blocks."""
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's files as git sees them, with this virtual environment as its .venv."""
    folder = tmp_path_factory.mktemp("checkout")
    copy_repository(folder)
    (folder / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != ".installed":
            (folder / ".venv" / entry.name).symlink_to(entry)
    (folder / ".venv/.installed").touch()  # as new as can be, so that make installs nothing
    return folder


@pytest.mark.timeout(3 * LIMIT_S)
@pytest.mark.parametrize(
    "documents",
    [
        pytest.param([name for name in DOCUMENTS if name not in LATER], id="most"),
        pytest.param(["README.md", *LATER], id="later", marks=pytest.mark.long),
    ],
)
def test_every_command_runs(checkout: Path, documents: list[str]) -> None:
    typed = {"deepspeed", "torchrun"}  # by `make quickstart`, and in test_pretrain.py
    for document in documents:
        for command in commands(document):
            if command.startswith(SELF):
                continue  # this is one of the tests that they run
            if command.startswith(SERVERS):
                run_server(command, checkout)
                continue
            program = command.split()[0]
            started = started_warm(shortened(command), checkout) if program in typed else None
            done = started or run("bash", "-c", shortened(command), cwd=checkout, environ=quick(), timeout=LIMIT_S)
            typed.add(program)
            if command in NEEDS_COMPILER and find_cxx() is None:
                assert done.code != 0
                assert "there is no C++ compiler" in done.output
                continue
            assert done.code == 0, f"{document}: {command}\n{done.output[-6000:]}"


def started_warm(command: str, checkout: Path) -> Finished | None:
    """Run a command of ours in warm processes; None if it needs a shell or another launcher."""
    words = [name for word in shlex.split(command) for name in (sorted(checkout.glob(word)) if "*" in word else [word])]
    match words:
        case ["megalm", *_]:
            ranks = None
        case ["python", str(script), *_] if script.endswith(".py"):
            words, ranks = words[1:], None
        case ["deepspeed", "--num_accelerators", str(number), *_]:
            words, ranks = words[3:], int(number)
        case ["torchrun", "--standalone", "--nproc-per-node", str(number), "-m", "megalm.cli", *_]:
            words, ranks = ["megalm", *words[6:]], int(number)
        case ["torchrun", "--nnodes", "1", "--node-rank", "0", "--nproc-per-node", str(number), *_]:
            words, ranks = words[11:], int(number)
        case _:
            return None
    return warm.run(*words, ranks=ranks, cwd=checkout, environ=quick(), timeout=LIMIT_S)


def shortened(command: str) -> str:
    """The command as it stands, but a run takes a few steps only, of a small model, on few ranks and little text."""
    command = command.replace("--num_accelerators 8", "--num_accelerators 4")
    command = re.sub(r"--size-mb [12]\b", "--size-mb 0.5", command)
    if "launch/pretrain_" not in command or "--help" in command or "--print-config" in command:
        return command
    if "--train-iters" not in command:
        return f"{command} {SHORTER}"
    return f"{command} {SMALLER} --eval-iters 1" if "quickstart" in command else command


def quick() -> dict[str, str]:
    """The environment of a user in the activated virtual environment; the Makefile's sizes made small."""
    return environment() | {"CORPUS_MB": "0.5", "TRAIN_ARGS": SHORTER, "RANKS": "2", "OMP_NUM_THREADS": "1"}


def run_server(command: str, checkout: Path) -> None:
    """A server comes up and stays up."""
    process = subprocess.Popen(
        [*shlex.split(command), "--port", "0"], cwd=checkout, env=environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        assert any("http://" in line for line in process.stderr), "it says its address"
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_quickstart_a_second_time_redoes_nothing(checkout: Path) -> None:
    def make(*options: str) -> str:
        done = run("make", *options, "quickstart", cwd=checkout, environ=quick(), timeout=LIMIT_S)
        assert done.code == 0, done.output[-6000:]
        return done.output

    if not (checkout / "data/quickstart/corpus_text_document.idx").exists():  # the README's first command has made it
        make()
    train, report = make("--dry-run").splitlines()  # of what is made from the corpus nothing is made again
    assert "megalm report --load runs/quickstart" in report
    done = started_warm(train[train.index("deepspeed") :], checkout)
    assert done is not None
    assert done.code == 0, done.output
    assert "already complete: step 4 of 4" in done.output


def test_the_list_of_settings_is_up_to_date() -> None:
    from megalm.config.merging.reference import reference_markdown

    assert (REPOSITORY / "docs/configuration.md").read_text(encoding="utf-8") == reference_markdown(), "run: make docs"


def test_every_file_that_the_documents_link_to_is_there() -> None:
    for document in DOCUMENTS:
        text = (REPOSITORY / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (REPOSITORY / os.path.dirname(document) / target).exists(), f"{document} links to {target}"
