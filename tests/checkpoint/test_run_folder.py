"""The run folder is proved writable before training, and --fresh loses nothing."""

import logging
import os
from pathlib import Path

import pytest
from handmade import names

from megalm.checkpoint.format import find_checkpoint
from megalm.checkpoint.room import check_room
from megalm.checkpoint.run_folder import lock_run_folder, prepare_run_folder, set_aside, write_config
from megalm.errors import CheckpointError


def test_a_run_folder_is_made_with_its_parents_and_left_empty(tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    prepare_run_folder(run)
    prepare_run_folder(run)
    assert names(run) == []


@pytest.mark.parametrize("below", ["", "run", "deep/run"])
def test_a_folder_that_cannot_be_made_is_refused_before_training(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"cannot write .*file.*: .*choose another folder for --save"):
        prepare_run_folder(tmp_path / "file" / below)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("megalm.checkpoint.run_folder.tempfile.NamedTemporaryFile", refuse)
    with pytest.raises(CheckpointError, match=r"cannot write .*: Permission denied"):
        prepare_run_folder(tmp_path)


def test_set_aside_keeps_the_earlier_run_whole_and_leaves_an_empty_place(run: Path) -> None:
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "tensorboard").mkdir()
    (run / "notes.txt").write_text("mine")
    assert set_aside(run) == run / "previous_1"
    assert names(run) == ["notes.txt", "previous_1"]
    assert names(run / "previous_1") == ["latest", "metrics.jsonl", "step_2", "tensorboard"]
    assert find_checkpoint(run) is None
    assert find_checkpoint(run / "previous_1") == run / "previous_1" / "step_2"


def test_each_earlier_run_has_its_own_number(run: Path) -> None:
    set_aside(run)
    write_config(run, "second: run\n")
    assert set_aside(run) == run / "previous_2"
    assert (run / "previous_2" / "config.yaml").read_text() == "second: run\n"


def test_there_may_be_nothing_to_set_aside(tmp_path: Path) -> None:
    assert set_aside(tmp_path) is None
    assert names(tmp_path) == []


def test_a_second_job_is_refused_while_the_first_holds_the_folder(tmp_path: Path) -> None:
    first = lock_run_folder(tmp_path)
    with pytest.raises(CheckpointError, match=f"in use by another job .process {os.getpid()} on"):
        lock_run_folder(tmp_path)
    first.close()
    lock_run_folder(tmp_path).close()


def test_a_limit_below_a_shard_is_refused_before_training_and_a_full_disk_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("megalm"), "propagate", True)
    check_room(tmp_path, 2000, 8000)
    monkeypatch.setattr("resource.getrlimit", lambda which: (1000, 1000))
    with pytest.raises(CheckpointError, match=r"has 0.0 MB, and ulimit -f allows 0.0 MB a file"):
        check_room(tmp_path, 2000, 8000)
    assert not caplog.messages
    check_room(tmp_path, 500, 10**18)
    assert "free some space before the first save" in caplog.messages[0]
