"""A checkpoint is absent or complete: failing ranks, a kill at every point, the order of writes, pruning."""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from handmade import names, save

from megalm.checkpoint import writer
from megalm.checkpoint.format import find_checkpoint, steps_of
from megalm.checkpoint.reader import CheckpointReader
from megalm.errors import CheckpointError, MegalmError
from megalm.storage import durable as files
from megalm.testing.spawner import run_on_ranks

NO_SPACE = OSError(28, "No space left on device")


@contextmanager
def replaced(module: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, original)


def failing(*_: object, **__: object) -> None:
    raise NO_SPACE


FAULTS = [("save_file", 1), ("save_file", 0), ("sync_file", 1), ("sha256_of", 1), ("new_folder", 0), ("_commit", 0)]
FAULTS += [("replace_text", 0), ("sync_folder", 0)]
"""Function of the writer that fails, and the rank where it does."""


def saves_with_faults(run: Path) -> list[dict[str, Any]]:
    """What this rank sees of a save with each fault, then of one without."""
    save(run, 2)
    seen = []
    for name, rank in [*FAULTS, ("save_file", None)]:
        replacement = failing if dist.get_rank() == rank else getattr(writer, name)
        row: dict[str, Any] = {}
        with replaced(writer, name, replacement):
            try:
                save(run, 4, keep=1 if rank is None else None)
            except MegalmError as error:
                row |= {"type": type(error).__name__, "text": str(error), "code": error.exit_code}
                row |= {"local": error.local, "silent": error.silent}
        dist.barrier()
        seen.append(row | {"names": names(run), "latest": (run / "latest").read_text()})
        dist.barrier()
    return seen


@pytest.fixture(scope="module")
def fault_rows(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """For each fault, and then for the save without one, what each rank saw."""
    by_rank = run_on_ranks(2, saves_with_faults, tmp_path_factory.mktemp("faults"), timeout_s=60)
    return [list(rows) for rows in zip(*by_rank, strict=True)]


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[f"{name} on rank {rank}" for name, rank in FAULTS])
def test_a_failing_rank_leaves_nothing_and_every_rank_learns(fault_rows: Any, number: int) -> None:
    name, rank = FAULTS[number]
    own, peer = fault_rows[number][rank], fault_rows[number][1 - rank]
    assert (own["local"], own["silent"]) == (True, False)
    assert "No space left on device" in own["text"]
    assert (peer["type"], peer["silent"]) == ("PeerError", True)
    assert own["code"] == peer["code"]
    if name not in ("new_folder", "_commit"):  # patched whole, they raise past the error's translation
        assert (own["type"], own["code"]) == ("CheckpointError", CheckpointError.exit_code)
    for row in (own, peer):
        assert row["latest"] == "step_2\n"
        assert ".step_4.partial" not in row["names"]
        # after the rename the folder is complete; `latest` does not name it yet
        assert row["names"] == (["latest", "step_2", "step_4"] if name == "sync_folder" else ["latest", "step_2"])


def test_a_full_disk_is_told_with_sizes(fault_rows: Any) -> None:
    text = fault_rows[FAULTS.index(("save_file", 1))][1]["text"]
    for part in ("rank_00001.safetensors", "it needs 0.0 MB", "MB are free", "choose another --save"):
        assert part in text


def test_after_failures_the_same_ranks_can_save(fault_rows: Any) -> None:
    for row in fault_rows[-1]:
        assert row == {"names": ["latest", "step_4"], "latest": "step_4\n"}


def save_until(run: Path, point: int) -> None:
    """Save step 4, keeping one; the process is gone just before its `point`-th change of the disk."""
    left = [point]

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any, **options: Any) -> Any:
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return original(*arguments, **options)

        return change

    for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    writer.save_file = counted(writer.save_file)
    save(run, 4, keep=1)


@pytest.mark.usefixtures("_alone")
def test_a_kill_at_any_point_leaves_a_complete_checkpoint_and_the_next_save_cleans_up(tmp_path: Path) -> None:
    outcomes: list[int] = []
    for point in range(60):
        run = tmp_path / str(point)
        for step in (4, 2):  # 4 of an earlier attempt
            save(run, step)
        try:
            run_on_ranks(1, save_until, run, point)
            killed = False
        except AssertionError as error:
            killed = "died without a word" in str(error)
            if not killed:
                raise
        found = find_checkpoint(run)
        assert found is not None, f"killed at point {point}"
        assert CheckpointReader(found).manifest.step == int(found.name.removeprefix("step_"))
        for step in steps_of(run):
            CheckpointReader(run / f"step_{step}")
        outcomes.append(int(found.name.removeprefix("step_")))
        save(run, 6, keep=1)
        assert names(run) == ["latest", "step_6"], f"killed at point {point}"
        if not killed:
            break
    assert not killed, "the last save was not killed"
    assert outcomes == sorted(outcomes), "`latest` moves once"
    assert set(outcomes) == {2, 4}
    assert len(outcomes) > 10


def recorded_save(run: Path) -> list[tuple[float, str, str]]:
    """(time, call, path) of what makes this rank's part of a save durable."""
    events: list[tuple[float, str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def note(call: str, path: object) -> None:
        events.append((time.monotonic(), call, os.path.relpath(str(path), run)))

    def noted_fsync(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        fsync(handle)
        note("fsync", path)

    def noted_rename(source: object, target: object) -> None:
        note("rename", target)
        rename(source, target)

    def noted_replace(source: object, target: object) -> None:
        note("replace", target)
        replace(source, target)

    with (
        replaced(os, "fsync", noted_fsync),
        replaced(os, "rename", noted_rename),
        replaced(os, "replace", noted_replace),
    ):
        if dist.get_rank() == 1:
            original = writer.save_file
            writer.save_file = lambda *arguments: (time.sleep(0.3), original(*arguments))  # rank 0 must wait for it
        save(run, 2)
    return events


def test_everything_is_on_disk_before_it_gets_its_name(tmp_path: Path) -> None:
    by_rank = run_on_ranks(2, recorded_save, tmp_path)
    events = [(call, path) for _, call, path in sorted(event for events in by_rank for event in events)]
    partial = ".step_2.partial"
    shards = [("fsync", f"{partial}/rank_0000{rank}.safetensors") for rank in (0, 1)]
    assert sorted(events[:2]) == shards
    assert events[2:] == [
        ("fsync", f"{partial}/.manifest.json.tmp"),
        ("replace", f"{partial}/manifest.json"),
        ("fsync", partial),
        ("rename", "step_2"),
        ("fsync", "."),
        ("fsync", ".latest.tmp"),
        ("replace", "latest"),
        ("fsync", "."),
    ]


@pytest.mark.usefixtures("_alone")
class TestPruning:
    def test_only_the_oldest_go(self, tmp_path: Path) -> None:
        for step, left in ((2, [2]), (4, [2, 4]), (10, [4, 10]), (11, [10, 11])):
            save(tmp_path, step, keep=2)
            assert steps_of(tmp_path) == left
            assert find_checkpoint(tmp_path) == tmp_path / f"step_{step}"
            CheckpointReader(tmp_path / f"step_{left[0]}")

    def test_without_a_limit_all_stay(self, tmp_path: Path) -> None:
        for step in range(1, 5):
            save(tmp_path, step)
        assert names(tmp_path) == ["latest", "step_1", "step_2", "step_3", "step_4"]

    def test_a_run_that_was_turned_back_keeps_what_it_saves(self, tmp_path: Path) -> None:
        for step in (2, 4, 8):
            save(tmp_path, step)
        (tmp_path / "latest").write_text("step_2\n")
        save(tmp_path, 6, keep=1)
        assert find_checkpoint(tmp_path) == tmp_path / "step_6"
        CheckpointReader(tmp_path / "step_6")
        assert steps_of(tmp_path) == [6, 8]
        save(tmp_path, 8, keep=1)
        assert steps_of(tmp_path) == [8]

    @pytest.mark.parametrize("refused", ["rmtree", "rename"])
    def test_what_cannot_be_removed_is_one_warning_and_blocks_no_later_save(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, refused: str
    ) -> None:
        save(tmp_path, 2)
        rename, rmtree = os.rename, shutil.rmtree

        def only_shards_move(source: Any, target: Any) -> None:
            failing() if str(target).endswith(".removed") else rename(source, target)

        def nothing_goes(folder: Any, **options: Any) -> None:
            rmtree(folder, **options) if options else failing()

        fault = (shutil, "rmtree", nothing_goes) if refused == "rmtree" else (os, "rename", only_shards_move)
        with caplog.at_level(logging.WARNING, "megalm"), replaced(*fault):
            for step in (4, 6, 8):
                save(tmp_path, step, keep=1)
        assert ["cannot be removed: No space left" in record.getMessage() for record in caplog.records] == [True]
        assert find_checkpoint(tmp_path) == tmp_path / "step_8"
        save(tmp_path, 2, keep=1)  # a name that is taken by what could not be removed
        save(tmp_path, 10, keep=1)
        assert names(tmp_path) == ["latest", "step_10"]


@pytest.mark.usefixtures("_alone")
def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    for _ in range(2):
        save(tmp_path, 2)
        assert CheckpointReader(tmp_path / "step_2").manifest.step == 2
    assert names(tmp_path) == ["latest", "step_2"]


def test_replacing_a_text_that_fails_leaves_the_old_one_alone(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    files.replace_text(path, "old")
    with replaced(os, "replace", failing), pytest.raises(OSError, match="No space"):
        files.replace_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["latest"]
