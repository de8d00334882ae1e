"""Damaged or foreign checkpoints are refused, with every problem in one message."""

import shutil
from pathlib import Path

import pytest
import torch
from handmade import MOMENTS, TENSORS, save, value
from torch import nn

from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.restore import restore_slices, restore_weights
from megalm.checkpoint.resume import check_same_run
from megalm.distributed.shards import ShardSpec, StateSlice
from megalm.errors import CheckpointError

FIRST, SECOND = "rank_00000.safetensors", "rank_00001.safetensors"


def flip(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_an_intact_checkpoint_gives_any_range_of_any_tensor(run: Path) -> None:
    reader = CheckpointReader(run / "step_2")
    assert reader.names == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(reader.read_tensor(name), tensor + 2)
        for kind in ("weight", *MOMENTS):
            expected = value(name, kind, 2)
            for start in range(len(expected)):
                for stop in range(start, len(expected) + 1):
                    assert torch.equal(reader.read(name, kind, start=start, stop=stop), expected[start:stop])


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (lambda path: truncate(path, 100), r"rank_00001.safetensors has 100 bytes, not \d+"),
        (lambda path: truncate(path, 0), r"rank_00001.safetensors has 0 bytes, not \d+"),
        (flip, "rank_00001.safetensors has another SHA-256 than was written"),
        (lambda path: flip(path, 20), "rank_00001.safetensors has another SHA-256 than was written"),
        (Path.unlink, "rank_00001.safetensors is missing"),
    ],
    ids=["truncated", "empty", "flipped value", "flipped header", "missing"],
)
def test_a_damaged_shard_is_named_with_what_is_wrong(run: Path, harm: object, text: str) -> None:
    harm(run / "step_2" / SECOND)
    with pytest.raises(CheckpointError, match=rf"step_2 is damaged: {text}; load another step") as caught:
        CheckpointReader(run / "step_2")
    assert FIRST not in str(caught.value)


def test_all_damaged_shards_are_named_at_once(run: Path) -> None:
    (run / "step_2" / FIRST).unlink()
    flip(run / "step_2" / SECOND)
    with pytest.raises(CheckpointError, match=f"{FIRST} is missing; {SECOND} has another SHA-256"):
        CheckpointReader(run / "step_2")


def test_swapped_shards_are_noticed(run: Path) -> None:
    one, other = run / "step_2" / FIRST, run / "step_2" / SECOND
    one.rename(run / "aside")
    other.rename(one)
    (run / "aside").rename(other)
    with pytest.raises(CheckpointError, match=f"{FIRST} .*; {SECOND} "):
        CheckpointReader(run / "step_2")


@pytest.mark.usefixtures("_alone")
def test_a_shard_of_another_step_is_noticed(run: Path) -> None:
    shutil.copy(save(run.parent / "other", 3) / FIRST, run / "step_2" / FIRST)
    with pytest.raises(CheckpointError, match=f"{FIRST} has "):
        CheckpointReader(run / "step_2")


def test_without_verification_sizes_still_count(run: Path) -> None:
    flip(run / "step_2" / FIRST)
    CheckpointReader(run / "step_2", verify=False)
    truncate(run / "step_2" / SECOND, 100)
    with pytest.raises(CheckpointError, match="has 100 bytes"):
        CheckpointReader(run / "step_2", verify=False)


def restore_into(run: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    received: dict[str, torch.Tensor] = {}
    by_parameter = {parameter: name for name, parameter in parameters.items()}
    restore_weights(
        CheckpointReader(run / "step_2"),
        parameters,
        {name: ShardSpec.of_whole(shape) for name, shape in shapes.items()},
        lambda parameter, part: received.update({by_parameter[parameter]: part.view(parameter.shape)}),
    )
    return received


def test_weights_reach_every_parameter(run: Path) -> None:
    received = restore_into(run, {"a.weight": (3, 5), "b.bias": (4,)})
    assert all(torch.equal(received[name], tensor + 2) for name, tensor in TENSORS.items())


def test_another_model_is_refused_with_every_difference(run: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        restore_into(run, {"a.weight": (5, 3), "c.weight": (2, 2)})
    text = str(caught.value)
    assert "step_2 is of another model" in text
    assert "c.weight is not in the checkpoint" in text
    assert "b.bias is only in the checkpoint" in text
    assert "a.weight is (3, 5) in the checkpoint, (5, 3) here" in text
    assert "config.yaml" in text


def test_many_differences_are_counted(run: Path) -> None:
    with pytest.raises(CheckpointError, match="and 4 more"):
        restore_into(run, {f"layer.{number}": (1,) for number in range(7)})


def piece(start: int, stop: int) -> StateSlice:
    moments = {kind: torch.zeros(stop - start) for kind in MOMENTS}
    return StateSlice("a.weight", ShardSpec.of_whole((3, 5)), start, stop, torch.zeros(stop - start), moments)


def test_slices_of_another_layout_are_filled(run: Path) -> None:
    found = piece(5, 11)  # the writers' border is at 7
    restore_slices(CheckpointReader(run / "step_2"), [found], with_moments=True)
    for kind, view in found.tensors().items():
        assert torch.equal(view, value("a.weight", kind, 2)[5:11])


@pytest.mark.usefixtures("_alone")
def test_moments_that_were_not_saved_are_asked_for_in_vain(tmp_path: Path) -> None:
    reader = CheckpointReader(save(tmp_path, 2, with_moments=False))
    found = piece(0, 15)
    restore_slices(reader, [found], with_moments=False)
    assert torch.equal(found.weight, value("a.weight", "weight", 2))
    with pytest.raises(CheckpointError, match=r"holds no optimizer state \(--no-save-optim\); give --no-load-optim"):
        restore_slices(reader, [found], with_moments=True)


CONFIG = {"model": {"num_layers": 1}, "optimizer": {"lr": 0.1}, "training": {"seed": 7}}
IDENTITY = {"tokenizer": "aaaabbbbccccdddd"}


def test_the_same_run_may_change_what_does_not_touch_weights_or_samples(run: Path) -> None:
    manifest = CheckpointReader(run / "step_2").manifest
    assert check_same_run(manifest, CONFIG, IDENTITY) == []
    assert check_same_run(manifest, CONFIG | {"optimizer": {"lr": 0.2}}, IDENTITY) == ["optimizer.lr was 0.1, is 0.2"]


def test_another_run_is_refused_with_every_difference(run: Path) -> None:
    manifest = CheckpointReader(run / "step_2").manifest
    other = {"model": {"num_layers": 2}, "optimizer": {"lr": 0.1}, "training": {"seed": 8}}
    with pytest.raises(CheckpointError) as caught:
        check_same_run(manifest, other, {"tokenizer": "eeeeffffgggghhhh"})
    text = str(caught.value)
    assert "not the run of the checkpoint of step 2" in text
    assert "model.num_layers was 1, is 2" in text
    assert "training.seed was 7, is 8" in text
    assert "the tokenizer is not the one that the run began with (aaaabbbbcccc became eeeeffffgggg)" in text
