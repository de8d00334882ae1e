"""A disk that is full for a while, or for good: secondary output only warns, and a failed save is tried again."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalm.checkpoint.format import find_checkpoint
from megalm.checkpoint.reader import CheckpointReader
from megalm.testing import warm
from megalm.testing.small_runs import SCRIPT, losses_in_order, write_recipe


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB, of which 7 are taken."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    (folder / "filler").write_bytes(bytes(7 << 20))
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def command(tmp_path: Path, run: Path, *flags: str) -> list[str]:
    (tmp_path / "file").touch()
    recipe = str(write_recipe(tmp_path))
    return [
        SCRIPT,
        "--config",
        recipe,
        "--save",
        str(run),
        "--tensorboard-dir",
        str(tmp_path / "file"),
        "--kernels-backend",
        "reference",
        *flags,
    ]


def test_a_save_that_fails_is_tried_again_at_the_next_interval(tmp_path: Path, disk: Path) -> None:
    run = disk / "run"
    flags = ("--train-iters", "24", "--save-interval", "4", "--keep-checkpoints", "1")
    with warm.Job(*command(tmp_path, run, *flags), ranks=2) as job:
        job.wait_for("step 4 is not saved: ", timeout=240)
        (disk / "filler").unlink()
        done = job.wait()
    assert done.code == 0, done.output
    assert "MB are free there; free some space before the first save" in done.output
    assert "rank_00000.safetensors: No space left on device (" in done.output
    assert done.output.count("TensorBoardSink cannot write") == 1
    assert "Traceback" not in done.output
    found = find_checkpoint(run)
    assert found == run / "step_24"
    CheckpointReader(found)
    assert [path.name for path in run.glob(".*") if path.name != ".lock"] == []
    assert len(losses_in_order(run)) == 24
    report = warm.run("megalm", "report", "--load", run)  # the run has no tokenizer, so there is no sample
    assert report.code == 0, report.output
    assert "training loss" in report.output
    assert "no sample: the run of " in report.output


def test_at_the_end_a_failed_save_is_the_error(tmp_path: Path, disk: Path) -> None:
    run = disk / "run"
    done = warm.run(*command(tmp_path, run, "--train-iters", "6", "--save-interval", "3"), ranks=2)
    assert done.code == 4, done.output
    assert done.output.count("error") == 1
    assert "is not saved: " in done.output
    assert "Traceback" not in done.output
    assert find_checkpoint(run) is None
    assert [path.name for path in run.glob(".*") if path.name != ".lock"] == []
