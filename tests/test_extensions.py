"""Every table is extended from a folder outside the package: the modules of docs/contributing.md, trained with."""

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megalm.continuation import ResumePoint
from megalm.distributed.mesh import Mesh
from megalm.run_state import Stateful
from megalm.testing import warm
from megalm.testing.processes import REPOSITORY, Finished, environment

DOCUMENT = REPOSITORY / "docs" / "contributing.md"
EXAMPLES = re.findall(r"```python\n# (my_lab/\w+\.py)[^\n]*\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
MODEL = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --micro-batch-size 2 --lr 0.01"
RUN = "--train-iters 3 --log-interval 1 --eval-iters 1 --mock-data --kernels-backend reference"
MODULES = ("objective", "family", "tokenizer", "sink", "optimizer")
NAMES = "--objective every-second --model-family scaled-gpt --tokenizer-type LowerCaseTokenizer --optimizer sgd"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package my_lab."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "my_lab").mkdir()
    for path, code in EXAMPLES:
        (folder / path).write_text(code)
    optimizers = (REPOSITORY / "docs" / "optimizers.md").read_text(encoding="utf-8")
    (folder / "my_lab" / "optimizer.py").write_text(optimizers.split("```python\n")[1].split("```")[0])
    return folder


def run(folder: Path, *command: str, ranks: int | None = None) -> Finished:
    search = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return warm.run(*command, ranks=ranks, environ=environment() | {"PYTHONPATH": search})


def test_an_example_takes_forty_lines_at_most() -> None:
    assert len(EXAMPLES) == 8
    assert [path for path, code in EXAMPLES if len(code.splitlines()) > 40] == []


@pytest.mark.e2e
def test_a_run_of_an_objective_family_tokenizer_optimizer_and_sink_from_outside(folder: Path, tmp_path: Path) -> None:
    modules = [f"my_lab.{name}" for name in MODULES]
    words = [*MODEL.split(), *RUN.split(), *NAMES.split(), "--import-module", *modules]
    sinks = ["--sinks", "terminal", "jsonl", "losses", "--save", str(tmp_path / "run")]
    done = run(folder, "launch/pretrain_gpt.py", *words, *sinks, "--tensor-model-parallel-size", "2", ranks=2)
    assert done.code == 0, done.output
    rows = [line.split() for line in (tmp_path / "run" / "losses.txt").read_text().splitlines()]
    assert [int(step) for step, _ in rows] == [1, 2, 3]
    assert not (tmp_path / "run" / "tensorboard").exists(), "--sinks leaves it out"
    plain = run(folder, "launch/pretrain_gpt.py", *MODEL.split(), *RUN.split(), "--vocab-size", "257")
    assert f"lm loss: {float(rows[0][1]):.6E}" not in plain.output, "the family and the objective change the loss"
    prompt = ["--load", str(tmp_path / "run"), "--prompt", "ABC", "--max-new-tokens", "2"]
    shown = run(folder, "megalm", "generate", *prompt)
    assert shown.code == 0, shown.output
    assert shown.output.startswith("abc"), "the checkpoint remembers the modules: the tokenizer is the run's"


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--objective every-second", "objective=every-second must be one of causal"),
        ("--import-module my_lab.none", "import_module=my_lab.none cannot be imported (ModuleNotFoundError"),
        (
            "--optimizer sdg --import-module my_lab.optimizer",
            "optimizer=sdg must be one of adam, lion, muon, sgd",
        ),
    ],
)
def test_names_and_modules_that_are_not_there_are_one_error(folder: Path, words: str, expected: str) -> None:
    done = run(folder, "launch/pretrain_gpt.py", *MODEL.split(), *RUN.split(), "--vocab-size", "99", *words.split())
    assert (done.code, len(done.errors)) == (2, 1), done.output
    assert expected in done.output


def test_the_other_examples_do_what_they_say(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_lab"]:
        monkeypatch.delitem(sys.modules, name)
    from my_lab import group, runner, shard, state

    kept: Stateful = state.LowestLoss()
    kept.value = 2.5
    other = state.LowestLoss()
    ResumePoint(states={kept.name: kept.state()}).load(other)
    assert other.value == 2.5
    assert shard.experts_of(1, 2, 8, 4, 3).box.index()[0] == slice(4, 8)
    assert group.ranks_without_pipeline(Mesh.of(8, pp=2, tp=2)) == [[0, 1, 2, 3], [4, 5, 6, 7]]

    counted = runner.Counted(SimpleNamespace(loss_weights={"lm": 1.0}, train=lambda *_: None))
    counted.train([1, 2, 3], {}, 1.0, None)
    assert (counted.batches, counted.loss_weights) == (3, {"lm": 1.0})
