"""Training from text to text on warm ranks, and once through torchrun.

The deepspeed launcher starts the runs of test_documentation.py, test_bad_input.py and test_parallel_run.py.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalm.testing import warm
from megalm.testing.processes import BIN, REPOSITORY, environment, free_port, run
from megalm.testing.small_runs import SCRIPT, Workspace, losses, metrics

pytestmark = pytest.mark.e2e
LONGER = ["--train-iters", "24", "--eval-interval", "12", "--save-interval", "12", "--lr", "0.01"]


@pytest.fixture(scope="module")
def trained(workspace: Workspace) -> Path:
    """24 steps on two ranks at ZeRO 1, evaluated on the way."""
    folder = workspace.folder / "trained"
    done = workspace.train(*LONGER, "--save", folder)
    assert done.code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def one_process(workspace: Workspace) -> Path:
    """Ten steps in one process without a launcher, same global batch, same micro-batches."""
    folder = workspace.folder / "one_process"
    done = workspace.train("--zero-stage", "0", "--save", folder, ranks=None)
    assert done.code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def ten_steps(workspace: Workspace) -> Callable[[int], Path]:
    """The run folder of ten steps on two ranks at one ZeRO stage with the shipped JSON."""

    @cache
    def trained_at(stage: int) -> Path:
        folder = workspace.folder / f"zero{stage}"
        done = workspace.train("--deepspeed_config", f"ds_configs/zero{stage}.json", "--save", folder)
        assert done.code == 0, done.output
        assert f"ZeRO {stage}" in done.output
        return folder

    return trained_at


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.long) for stage in (0, 2, 3))])
def test_every_zero_stage_on_two_ranks_prints_the_losses_of_one_process(
    workspace: Workspace, ten_steps: Callable[[int], Path], one_process: Path, stage: int
) -> None:
    assert losses(ten_steps(stage)) == pytest.approx(losses(one_process), rel=2e-5)


def test_the_model_learns(trained: Path) -> None:
    first, *_, last = [row["validation_loss"] for row in metrics(trained) if "validation_loss" in row]
    start = losses(trained)[1]
    assert start == pytest.approx(6.9, abs=0.4), "an untrained model is near ln(vocabulary)"
    assert first < start - 0.5
    assert last < first


def test_the_run_folder_holds_everything(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "tensorboard", "logs", "step_12", "step_24", "latest", ".lock"}
    assert (trained / "latest").read_text() == "step_24\n"
    assert {path.name for path in (trained / "logs").iterdir()} == {"rank_00000.log", "rank_00001.log"}
    assert yaml.safe_load((trained / "config.yaml").read_text())["model"]["vocab_size"] == 1000
    row = metrics(trained)[0]
    assert {"step", "loss", "grad_norm", "learning_rate", "tokens_per_s", "consumed_samples"} <= row.keys()
    assert row["consumed_samples"] == 16


def test_tensorboard_has_the_curves(trained: Path) -> None:
    events = EventAccumulator(str(trained / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"lm loss", "learning-rate", "grad-norm", "throughput/tokens-per-s"} <= tags
    assert {"lm loss validation", "lm loss validation ppl"} <= tags
    twins = EventAccumulator(str(trained / "tensorboard" / "vs_samples")).Reload()
    assert [point.step for point in twins.Scalars("lm loss vs samples")] == list(range(16, 385, 16))
    points = events.Scalars("lm loss")
    assert [point.step for point in points] == list(range(1, 25))
    assert points[9].value == pytest.approx(losses(trained)[10], rel=1e-6)


@pytest.mark.long  # bit for bit at every stage: checkpoint/test_checkpoint_across_layouts.py; after a signal: below
@pytest.mark.parametrize("stage", [2, 3])
def test_a_stopped_and_resumed_run_is_bit_equal(
    workspace: Workspace, ten_steps: Callable[[int], Path], stage: int
) -> None:
    whole, parts = ten_steps(stage), workspace.folder / f"parts{stage}"
    flags = ["--deepspeed_config", f"ds_configs/zero{stage}.json", "--save", parts]
    assert workspace.train(*flags, "--exit-interval", "4").code == 0
    assert max(losses(parts)) == 4
    assert workspace.train(*flags).code == 0
    for one, other in zip(metrics(whole), metrics(parts), strict=True):
        for name in ("step", "loss", "grad_norm", "validation_loss"):
            assert one.get(name) == other.get(name), (one["step"], name)


@pytest.mark.long
def test_resuming_with_other_ranks_and_another_stage_goes_on_alike(workspace: Workspace, one_process: Path) -> None:
    folder = workspace.folder / "changed_layout"
    assert workspace.train("--zero-stage", "3", "--save", folder, "--exit-interval", "5").code == 0
    done = workspace.train("--zero-stage", "1", "--save", folder, ranks=None)
    assert done.code == 0, done.output
    assert losses(folder) == pytest.approx(losses(one_process), rel=2e-5)
    assert "engine.zero_stage was 3, is 1" in done.output


def test_a_finished_run_says_so_and_changes_nothing(workspace: Workspace, trained: Path) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    done = workspace.train(*LONGER, "--save", trained)
    assert done.code == 0
    assert "already complete: step 24 of 24" in done.output
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_generate_is_reproducible_and_depends_on_the_seed(workspace: Workspace, trained: Path) -> None:
    command = ("megalm", "generate", "--load", trained, "--prompt", "import ", "--max-new-tokens", "20")
    first, again, other = (warm.run(*command, "--seed", seed).output for seed in ("1", "1", "2"))
    assert first == again
    assert first != other
    assert first.startswith("import ")


def test_report_shows_losses_sample_and_the_way_on(trained: Path) -> None:
    done = warm.run("megalm", "report", "--load", trained, "--max-new-tokens", "10", "--command", "type this")
    assert done.code == 0, done.output
    for text in ("training loss", "validation loss", "perplexity", "step_24", "tensorboard --logdir", "type this"):
        assert text in done.output


def test_a_signal_to_one_rank_saves_and_stops_all_and_the_run_goes_on_bit_equal(
    workspace: Workspace, tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = ["--train-iters", "20", "--eval-iters", "0"]
    assert workspace.train(*flags, "--save", whole).code == 0
    with workspace.job(*flags, "--save", stopped) as job:
        job.wait_for("iteration        3/")
        os.kill(job.pids[1], signal.SIGUSR1)
        done = job.wait()
    assert done.code != 0, done.output
    assert "SIGUSR1 received" in done.output
    step = int((stopped / "latest").read_text().removeprefix("step_"))
    assert 3 <= step < 20
    assert workspace.train(*flags, "--save", stopped).code == 0
    assert losses(stopped) == losses(whole)


def test_torchrun_on_two_nodes_gives_the_losses_of_one_process(workspace: Workspace, one_process: Path) -> None:
    folder = workspace.folder / "torchrun"
    port = str(free_port())
    nodes = [
        subprocess.Popen(
            ["torchrun", "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1", "--master-addr",
             "127.0.0.1", "--master-port", port, SCRIPT, *workspace.inputs, "--save", str(folder)],
            cwd=REPOSITORY, env=environment(),
        )
        for node in range(2)
    ]  # fmt: skip
    assert [node.wait(timeout=120) for node in nodes] == [0, 0]
    assert losses(folder) == pytest.approx(losses(one_process), rel=2e-5)


def test_the_config_of_a_run_is_a_recipe_of_the_same_run(workspace: Workspace, trained: Path) -> None:
    done = warm.run(SCRIPT, "--config", trained / "config.yaml")
    assert done.code == 0, done.output
    assert "already complete" in done.output


def test_fresh_sets_the_earlier_run_aside(workspace: Workspace, one_process: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(one_process, folder)
    done = workspace.train("--zero-stage", "0", "--train-iters", "5", "--save", folder, "--fresh", ranks=None)
    assert done.code == 0, done.output
    assert max(losses(folder)) == 5
    assert losses(folder / "previous_1") == losses(one_process)


def test_finetune_takes_the_weights_only(workspace: Workspace, trained: Path, tmp_path: Path) -> None:
    done = workspace.train(
        "--zero-stage", "0", "--load", trained, "--finetune", "--train-iters", "5", "--save", tmp_path, ranks=None
    )
    assert done.code == 0, done.output
    first = losses(tmp_path)[1]
    assert first < losses(trained)[1] - 0.5, "it starts from the trained weights"
    assert metrics(tmp_path)[0]["consumed_samples"] == 16


@pytest.mark.long  # parity rows; fp16 whole runs: test_bad_steps.py
@pytest.mark.parametrize("name", ["fp16", "offload"])
def test_fp16_and_offload_train(workspace: Workspace, one_process: Path, name: str) -> None:
    folder = workspace.folder / name
    done = workspace.train("--deepspeed_config", f"ds_configs/{name}.json", "--micro-batch-size", "2", "--save", folder)
    assert done.code == 0, done.output
    kept = {step: loss for step, loss in losses(folder).items() if step in (1, 2, 3)}
    assert kept[1] == pytest.approx(losses(one_process)[1], rel=0.02)


def test_nothing_heavy_is_imported_that_is_not_used(workspace: Workspace) -> None:
    flags = ["--train-iters", "1", "--eval-iters", "0"]
    done = run(BIN / "python", "-X", "importtime", SCRIPT, *workspace.inputs, *flags)
    assert done.code == 0, done.output
    modules = {line.rpartition("|")[2].strip() for line in done.output.splitlines() if "|" in line}
    loaded = {module.partition(".")[0] for module in modules}
    assert {"torch", "deepspeed", "megalm"} <= loaded
    unused = {"transformers", "megatron", "tensorboard", "tokenizers", "mpi4py", "pandas", "matplotlib", "pytest"}
    assert not loaded & unused
    assert not modules & {"torch._dynamo", "torch._inductor"}, "torch's compiler takes longer than torch"


@pytest.mark.long
def test_documents_apart_train_alike_on_one_and_on_two_ranks(workspace: Workspace, one_process: Path) -> None:
    """Packed samples as documents: the boundaries go with the samples, whatever the ranks."""
    flags = ("--reset-position-ids", "--reset-attention-mask", "--eod-mask-loss")
    folders = [workspace.folder / "documents_one", workspace.folder / "documents_two"]
    alone = workspace.train(*flags, "--zero-stage", "0", "--save", folders[0], ranks=None)
    assert alone.code == 0, alone.output
    two = workspace.train(*flags, "--deepspeed_config", "ds_configs/zero3.json", "--save", folders[1])
    assert two.code == 0, two.output
    found, apart, through = losses(folders[1]), losses(folders[0]), losses(one_process)
    assert found == pytest.approx(apart, rel=2e-5)
    assert any(abs(apart[step] - through[step]) > 1e-3 for step in apart), "boundaries must make a difference"
