"""Which checkpoint a folder offers, and manifests that cannot be trusted."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
from handmade import names

from megalm.checkpoint.format import FORMAT, Manifest, find_checkpoint, steps_of
from megalm.errors import CheckpointError


def test_a_run_folder_offers_what_latest_names_and_a_step_folder_itself(run: Path) -> None:
    assert find_checkpoint(run) == run / "step_2"
    assert find_checkpoint(run / "step_2") == run / "step_2"


@pytest.mark.parametrize("there", [True, False])
def test_without_checkpoints_there_is_nothing_to_offer(tmp_path: Path, there: bool) -> None:
    run = tmp_path / "run"
    if there:
        (run / "step_3").mkdir(parents=True)
        (run / ".step_4.partial").mkdir()
    assert find_checkpoint(run) is None
    assert find_checkpoint(run / "step_3") is None


def test_checkpoints_without_latest_are_not_silently_wasted(run: Path) -> None:
    (run / "latest").unlink()
    with pytest.raises(CheckpointError, match=r"holds checkpoints \(step_2\) but no file `latest`.*--fresh"):
        find_checkpoint(run)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"\xff\xfe\x00garbage",
        b"../../x",
        b"step_2/../step_2",
        b"/step_2",
        b"step_9",
        b"step_",
        b"step_2 step_3",
    ],
)
def test_a_latest_that_names_no_complete_checkpoint_here_is_refused(run: Path, content: bytes) -> None:
    (run / "latest").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is no complete checkpoint here \(there are: step_2\)"):
        find_checkpoint(run)


def test_latest_cannot_lead_out_of_the_run_folder(run: Path) -> None:
    other = run.parent / "x"
    (run / "step_2").rename(other)
    (run / "latest").write_text("../x")
    assert (run / "../x/manifest.json").is_file()
    with pytest.raises(CheckpointError, match=r"names '\.\./x'"):
        find_checkpoint(run)


def test_a_folder_without_manifest_is_no_checkpoint(run: Path) -> None:
    (run / "step_2" / "manifest.json").unlink()
    assert steps_of(run) == []
    with pytest.raises(CheckpointError, match="names 'step_2', which is no complete checkpoint here"):
        find_checkpoint(run)
    with pytest.raises(CheckpointError, match=r"step_2 is no complete checkpoint: it has no manifest\.json"):
        Manifest.read(run / "step_2")


def test_steps_are_ordered_by_number(run: Path) -> None:
    for step in (10, 9):
        (run / f"step_{step}").mkdir()
        (run / f"step_{step}" / "manifest.json").touch()
    assert names(run) == ["latest", "step_10", "step_2", "step_9"]
    assert steps_of(run) == [2, 9, 10]


def test_a_manifest_comes_back_as_it_was_written(run: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(run / "step_2")
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    assert Manifest.read(tmp_path) == manifest
    assert (manifest.step, manifest.states["progress"]["consumed_samples"], manifest.format) == (2, 16, FORMAT)


def test_a_newer_format_is_refused_with_both_versions(run: Path) -> None:
    path = run / "step_2" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": FORMAT + 1, "megalm": "9.8.7", "new": []}))
    with pytest.raises(
        CheckpointError, match=rf"format {FORMAT + 1}, written by megalm 9\.8\.7.*up to format {FORMAT}"
    ):
        Manifest.read(run / "step_2")


def test_a_flipped_bit_of_a_manifest_is_noticed(run: Path) -> None:
    path = run / "step_2" / "manifest.json"
    intact = path.read_bytes()
    whole = Manifest.read(run / "step_2")
    for position in range(0, len(intact), 3):
        flipped = bytearray(intact)
        flipped[position] ^= 1 << position % 7
        path.write_bytes(flipped)
        with suppress(CheckpointError):
            assert Manifest.read(run / "step_2") == whole, f"byte {position} changed the manifest unnoticed"


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"format": "1"}', '{"format": 1}', '{"format": 1, "sha256": "0"}', "\x00"]
)
def test_a_damaged_manifest_is_named(run: Path, text: str) -> None:
    (run / "step_2" / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"step_2/manifest\.json is damaged .*; load another step"):
        Manifest.read(run / "step_2")
