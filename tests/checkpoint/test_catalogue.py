"""`megalm checkpoint`: a run's checkpoints are listed, verified, thinned out and copied, and nothing good is lost."""

import json
import os
import shutil
from pathlib import Path

import pytest
from handmade import names, save

from megalm.checkpoint.catalogue import entries_of
from megalm.checkpoint.format import steps_of
from megalm.checkpoint.retention import Retention
from megalm.checkpoint.writer import prune_checkpoints
from megalm.cli import main
from megalm.errors import CheckpointError
from megalm.storage.lock import hold

pytestmark = pytest.mark.usefixtures("_alone")


@pytest.fixture
def six(run: Path) -> Path:
    """A run folder with checkpoints of two ranks at the steps 2, 4, ... 12, of which the newest is the latest."""
    for step in range(4, 14, 2):
        save(run, step)
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0, 10: 2.5}
    rows = [{"step": step, "validation_loss": loss} for step, loss in losses.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"step": 12, "loss": 9.0}]))
    return run


def flip(path: Path) -> None:
    """Another last byte."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        (Retention(), {2, 4, 6, 8, 10, 12}),
        (Retention(last=2), {10, 12}),
        (Retention(last=100), {2, 4, 6, 8, 10, 12}),
        (Retention(every=4), {4, 8, 12}),
        (Retention(every=5), {10, 12}),
        (Retention(best=1), {8, 12}),
        (Retention(best=3), {4, 6, 8, 12}),
        (Retention(best=9, last=1), {2, 4, 6, 8, 10, 12}),
        (Retention(last=2, every=6, best=1), {6, 8, 10, 12}),
    ],
)
def test_what_a_rule_wants_stays_and_the_newest_always(rules: Retention, kept: set[int]) -> None:
    values = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0, 10: 2.5, 12: 9.0}
    assert rules.kept(sorted(values), values) == kept


def test_a_list_names_each_checkpoint_its_loss_and_its_fault(six: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (six / "step_4/rank_00000.safetensors").write_bytes(b"cut")
    (six / "step_6/manifest.json").write_text("{}")
    assert main(["checkpoint", "list", str(six)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "age", "size", "validation_loss", "layout"]
    assert [line.split()[0] for line in lines] == ["2", "4", "6", "8", "10", "12"]
    assert "3.0000  world 2" in lines[0]
    assert "rank_00000.safetensors has 3 bytes, not" in lines[1]
    assert "it is no manifest" in lines[2]
    assert lines[5].endswith("latest")
    assert " -  world 2" in lines[5]
    assert main(["checkpoint", "list", str(six), "--metric", "loss"]) == 0
    assert "9.0000" in capsys.readouterr().out.splitlines()[-1]


def test_every_byte_is_verified_and_all_faults_are_one_error(six: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(six)]) == 0
    assert capsys.readouterr().out.count("is whole\n") == 6
    flip(six / "step_2/rank_00001.safetensors")
    flip(six / "step_8/rank_00000.safetensors")
    assert main(["checkpoint", "verify", str(six), "--sizes"]) == 0
    assert "by names and sizes" in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(six)]) == CheckpointError.exit_code
    told = capsys.readouterr()
    assert told.out.count("is whole\n") == 4
    assert f"{six}/step_2 is damaged: rank_00001.safetensors has another SHA-256" in told.err
    assert f"{six}/step_8 is damaged: rank_00000.safetensors has another SHA-256" in told.err
    assert main(["checkpoint", "verify", str(six / "step_10")]) == 0
    assert main(["checkpoint", "verify", str(six / "step_8")]) == CheckpointError.exit_code


def test_what_a_checkpoint_holds_is_described(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "inspect", str(run)]) == 0
    text = capsys.readouterr().out
    for told in (f"{run}/step_2", "2, 16 samples", "format 3, world 2", "weight, exp_avg, exp_avg_sq", "aaaabbbb"):
        assert told in text


def test_what_no_rule_wants_goes(six: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["checkpoint", "prune", str(six), "--keep-every", "6", "--keep-best", "1"]
    assert main([*words, "--dry-run"]) == 0
    assert "would remove step_2, step_4, step_10 (" in capsys.readouterr().out
    assert steps_of(six) == [2, 4, 6, 8, 10, 12]
    assert main(words) == 0
    assert capsys.readouterr().out.endswith("; 3 stay\n")
    assert steps_of(six) == [6, 8, 12]
    assert names(six) == [".lock", "latest", "metrics.jsonl", "step_12", "step_6", "step_8"]
    assert main(words) == 0
    assert "removed nothing" in capsys.readouterr().out


def test_a_run_removes_by_the_same_rules_and_leaves_what_it_turned_back_from(six: Path) -> None:
    prune_checkpoints(six, 10, Retention(best=1))
    assert steps_of(six) == [8, 10, 12]


def test_the_last_good_one_and_the_one_to_go_on_from_stay(six: Path) -> None:
    for step in (10, 12):
        flip(six / f"step_{step}/manifest.json")
    (six / "latest").write_text("step_4\n")  # the run has turned back
    assert main(["checkpoint", "prune", str(six), "--keep-last", "1"]) == 0
    assert steps_of(six) == [4, 6, 8, 10, 12]
    (six / "latest").write_text("step_12\n")
    assert main(["checkpoint", "prune", str(six), "--keep-last", "1"]) == 0
    assert steps_of(six) == [8, 10, 12], "8 is the newest that is good"
    flip(six / "step_8/manifest.json")
    assert main(["checkpoint", "prune", str(six), "--keep-last", "1"]) == 0
    assert steps_of(six) == [8, 10, 12], "without a good one nothing goes"


def test_a_copy_is_equal_or_not_there(six: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "elsewhere/run"
    assert main(["checkpoint", "copy", str(six), str(target)]) == 0
    assert f"{six}/step_12 is now {target}/step_12" in capsys.readouterr().out
    assert main(["checkpoint", "copy", str(six / "step_4"), str(target)]) == 0
    assert (target / "latest").read_text() == "step_12\n", "what was there goes on from where it was"
    for step in (4, 12):
        for path in (six / f"step_{step}").iterdir():
            assert (target / f"step_{step}" / path.name).read_bytes() == path.read_bytes()
    assert main(["checkpoint", "copy", str(six / "step_4"), str(target)]) == CheckpointError.exit_code
    assert "step_4 exists" in capsys.readouterr().err
    flip(six / "step_6/rank_00000.safetensors")
    assert main(["checkpoint", "copy", str(six / "step_6"), str(target)]) == CheckpointError.exit_code
    assert "step_6 is not copied: rank_00000.safetensors has another SHA-256" in capsys.readouterr().err
    assert names(target) == [".lock", "latest", "step_12", "step_4"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("list NOWHERE", "NOWHERE is no folder; give a run folder"),
        ("list EMPTY", "EMPTY holds no checkpoint; give a run folder"),
        ("list RUN/step_2", "step_2 is one checkpoint; give the run folder"),
        ("verify EMPTY", "EMPTY holds no checkpoint"),
        ("inspect EMPTY", "EMPTY holds no checkpoint"),
        ("copy EMPTY RUN", "EMPTY holds no checkpoint"),
        ("prune RUN", "no rule says what stays; give --keep-last N"),
        ("prune RUN --keep-best 1", "has a validation_loss in metrics.jsonl, so none is the best"),
        ("copy RUN RUN", "step_2 exists"),
        ("copy RUN FILE", "cannot write"),
    ],
)
def test_wrong_input_is_one_error(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").touch()
    places = {"RUN": run, **{name: tmp_path / name for name in ("NOWHERE", "EMPTY", "FILE")}}
    for name, place in places.items():
        words = words.replace(name, str(place))
    before = names(run)
    assert main(["checkpoint", *words.split()]) in (2, CheckpointError.exit_code)
    told = capsys.readouterr().err
    assert message in told
    assert told.count("error:") == 1
    assert [name for name in names(run) if name != ".lock"] == before


@pytest.mark.parametrize("words", ["prune RUN --keep-last 1", "copy OTHER RUN"])
def test_a_run_that_trains_is_left_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    shutil.copytree(run, tmp_path / "other")
    shutil.rmtree(run / "step_2")
    (run / ".step_4.partial").mkdir()
    with hold(run / ".lock"):
        asked = words.replace("RUN", str(run)).replace("OTHER", str(tmp_path / "other"))
        assert main(["checkpoint", *asked.split()]) == CheckpointError.exit_code
    assert "is in use by another job" in capsys.readouterr().err
    assert (run / ".step_4.partial").is_dir()


def test_a_folder_that_cannot_be_read_says_why(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> list[str]:
        raise PermissionError(13, "Permission denied", str(run))

    monkeypatch.setattr(os, "listdir", refused)
    with pytest.raises(CheckpointError, match=rf"cannot read {run}: .*; give this process the right"):
        entries_of(run)
