"""Manifests and shards that are well formed and wrong: refused with what is wrong, or read to the right values."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import TENSORS, value
from safetensors.torch import save_file

from megalm.checkpoint.format import MANIFEST, Manifest, _digest
from megalm.checkpoint.reader import CheckpointReader
from megalm.commands.generate import open_checkpoint
from megalm.errors import CheckpointError
from megalm.storage.durable import sha256_of

SECOND = "rank_00001.safetensors"


def content(folder: Path) -> Any:
    values = json.loads((folder / MANIFEST).read_text())
    del values["sha256"]
    return values


def write(folder: Path, values: Any) -> None:
    """A manifest with the right hash of itself, whatever it holds."""
    signed = {"sha256": _digest(values), **values} if isinstance(values, dict) else values
    (folder / MANIFEST).write_text(json.dumps(signed))


def piece(values: Any, number: int) -> Any:
    return values["tensors"]["a.weight"]["slices"][number]


CHANGES = {
    "no shards": (lambda v: v.update(files={}), "is not among the files"),
    "no tensors": (lambda v: v.update(tensors={}), "names no tensor"),
    "files are a list": (lambda v: v.update(files=[]), "files: "),
    "a path": (lambda v: v["files"].update({"../x": v["files"].pop(SECOND)}), "no plain file name"),
    "a path in a slice": (lambda v: piece(v, 1).update(file="/etc/passwd"), "no plain file name"),
    "a negative size": (lambda v: v["files"][SECOND].update(bytes=-1), "greater than or equal to 0"),
    "a hash of another form": (lambda v: v["files"][SECOND].update(sha256="0"), "sha256: "),
    "a gap": (lambda v: piece(v, 1).update(start=8, stop=15), "hold 14 of its 15 elements"),
    "a slice twice": (lambda v: v["tensors"]["a.weight"]["slices"].append(piece(v, 0)), "two slices .* in one shard"),
    "two slices in a shard": (lambda v: piece(v, 1).update(file=piece(v, 0)["file"]), "two slices .* in one shard"),
    "a slice over another": (lambda v: piece(v, 1).update(start=5), "overlap"),
    "a box over another": (lambda v: piece(v, 1).update(offsets=[1, 0], sizes=[2, 5], start=0, stop=8), "overlap"),
    "beyond the box": (lambda v: piece(v, 1).update(stop=16), "lies outside of its box"),
    "other dims": (lambda v: piece(v, 1).update(offsets=[0]), "lies outside of its box"),
    "a text for a number": (lambda v: piece(v, 1).update(start="7"), "slices.1.start: "),
    "true for a number": (lambda v: piece(v, 1).update(start=True), "slices.1.start: "),
    "no weight": (lambda v: v["tensors"]["a.weight"].update(kinds=["exp_avg"]), "must be weight and others"),
    "a kind twice": (lambda v: v["tensors"]["a.weight"].update(kinds=["weight", "weight"]), "each once"),
    "states are a list": (lambda v: v.update(states=[1]), "states: "),
    "no format": (lambda v: v.pop("format"), "says no format"),
    "a format in words": (lambda v: v.update(format="3"), "says no format"),
    "an earlier format": (lambda v: v.update(format=2), "no manifest of format 2"),
    "no step": (lambda v: v.pop("step"), "step: "),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_wrong_is_said(run: Path, name: str) -> None:
    change, said = CHANGES[name]
    values = content(run / "step_2")
    change(values)
    write(run / "step_2", values)
    with pytest.raises(CheckpointError, match=rf"manifest.json is damaged \(.*{said}.*\); load another step"):
        Manifest.read(run / "step_2")


@pytest.mark.parametrize("values", [[], {}, "x", None, 3, [[[]]]])
def test_other_json_is_no_manifest(run: Path, values: Any) -> None:
    write(run / "step_2", values)
    with pytest.raises(CheckpointError, match="it is no manifest"):
        Manifest.read(run / "step_2")


@pytest.mark.parametrize("text", ["[" * 50_000, "", "{", '{"a": 1, "a": 1}', '{"a": NaN}', "\x00"])
def test_what_is_no_json_is_damaged(run: Path, text: str) -> None:
    (run / "step_2" / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match="is damaged"):
        Manifest.read(run / "step_2")


def test_a_folder_under_another_number_is_refused(run: Path) -> None:
    (run / "step_2").rename(run / "step_9")
    with pytest.raises(CheckpointError, match="is that of step 2, not of the step that its folder names"):
        Manifest.read(run / "step_9")
    (run / "step_9").rename(run / "best")
    assert Manifest.read(run / "best").step == 2


def test_what_load_says_is_no_advice_for_save(run: Path) -> None:
    (run / "latest").unlink()
    with pytest.raises(CheckpointError, match="or load one of its step_N folders") as caught:
        open_checkpoint(str(run))
    assert "--fresh" not in str(caught.value)


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight/a.weight": torch.zeros(8, dtype=torch.int32)},
        {"weight/a.weight": torch.zeros(9)},
        {"weight/a.weight": torch.zeros(2, 4)},
        {"something": torch.zeros(8)},
    ],
    ids=["dtype", "length", "dims", "name"],
)
def test_a_shard_of_another_kind_is_damaged(run: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder = run / "step_2"
    save_file(tensors, folder / SECOND)
    values = content(folder)
    values["files"][SECOND].update(bytes=(folder / SECOND).stat().st_size, sha256=sha256_of(folder / SECOND))
    write(folder, values)
    with pytest.raises(CheckpointError, match=rf"{SECOND} is damaged"):
        CheckpointReader(folder).read_tensor("a.weight")


@pytest.mark.parametrize("raw", [b"", b"x" * 7, b"\xff" * 16, (10).to_bytes(8, "little") + b"[[[[[[[[[["])
def test_a_shard_that_is_no_safetensors_file_is_damaged(run: Path, raw: bytes) -> None:
    folder = run / "step_2"
    (folder / SECOND).write_bytes(raw)
    values = content(folder)
    values["files"][SECOND].update(bytes=len(raw), sha256=sha256_of(folder / SECOND))
    write(folder, values)
    with pytest.raises(CheckpointError, match=rf"{SECOND}.*damaged|cannot read .*{SECOND}"):
        CheckpointReader(folder).read_tensor("a.weight")


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    inside = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    found = [(value, key) for key, _ in inside]
    for _, part in inside:
        if isinstance(part, dict | list):
            found += places(part)
    return found


OTHERS = (None, True, -1, 0, 1, 7, 2**63, 10**30, 1.5, "", "x", "..", "rank_00001.safetensors", [], [0], {}, {"a": 1})


def test_mutants_are_refused_or_read_right(run: Path) -> None:
    """Only a manifest that means the same is read; what it does not need (config, layout) may say anything."""
    folder = run / "step_2"
    original, source = content(folder), random.Random("mutants of a manifest")
    for number in range(1000):
        values = copy.deepcopy(original)
        for _ in range(source.randint(1, 2)):
            container, key = source.choice(places(values))
            if source.random() < 0.2:
                del container[key]
            else:
                container[key] = copy.deepcopy(source.choice(OTHERS))
        write(folder, values)
        try:
            reader = CheckpointReader(folder, verify=number % 10 == 0)
            read = {name: reader.read_tensor(name) for name in reader.names}
        except CheckpointError:
            continue
        except Exception as error:
            raise AssertionError(f"mutant {number}") from error
        for name, tensor in read.items():
            if name in TENSORS and tensor.shape == TENSORS[name].shape and values["tensors"] == original["tensors"]:
                assert torch.equal(tensor.flatten(), value(name, "weight", 2)), f"mutant {number}"
