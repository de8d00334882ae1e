"""Tensors of any number of dims, cut along any of them and spread over ZeRO's parts: every other cut reads them."""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from handmade import UNCOMPARED
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from megalm.checkpoint.format import MANIFEST, Manifest
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.restore import restore_slices
from megalm.checkpoint.writer import save_checkpoint
from megalm.distributed.shards import Box, ShardSpec, StateSlice
from megalm.errors import CheckpointError
from megalm.storage.durable import sha256_of
from megalm.testing.spawner import run_on_ranks

HEADER: dict[str, Any] = {"step": 1, "layout": "", "config": {}, "identity": {}, "states": {}}
Cut = tuple[int, int, int]
"""Dim that is cut, number of boxes, ZeRO's parts of each."""


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(float(math.prod(shape))).view(shape)


def share(size: int, number: int, count: int) -> tuple[int, int]:
    """Part `number` of `count` parts, which need not be equal."""
    return size * number // count, size * (number + 1) // count


def pieces(shape: tuple[int, ...], cut: Cut) -> list[tuple[Box, int, int]]:
    """Box and range of every rank, of those that have any."""
    dim, count, parts = cut
    boxes = [Box.whole(shape).narrow(dim, *share(shape[dim], number, count)) for number in range(count)]
    ranges = [(box, *share(box.numel, part, parts)) for box in boxes for part in range(parts)]
    return [piece for piece in ranges if piece[1] < piece[2]]


def store(folder: Path, whole: torch.Tensor, cut: Cut) -> CheckpointReader:
    """A checkpoint of one tensor."""
    slices, files = [], {}
    for rank, (box, start, stop) in enumerate(pieces(tuple(whole.shape), cut)):
        file = f"{rank}.safetensors"
        save_file({"weight/t": whole[box.index()].flatten()[start:stop].clone()}, folder / file)
        entry = {"bytes": (folder / file).stat().st_size, "sha256": sha256_of(folder / file), "rank": rank}
        files[file] = entry
        slices.append({"file": file, "offsets": box.offsets, "sizes": box.sizes, "start": start, "stop": stop})
    tensors = {"t": {"shape": list(whole.shape), "kinds": ["weight"], "slices": slices}}
    (folder / MANIFEST).write_text(Manifest(**HEADER, files=files, tensors=tensors).to_json())
    return CheckpointReader(folder)


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], Cut, Cut]:
    """Shape, how it is written, how it is read."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    cut = st.tuples(st.integers(0, len(shape) - 1), st.integers(1, 4), st.integers(1, 3))
    return shape, draw(cut), draw(cut)


@given(cases())
@settings(deadline=None, max_examples=60)
def test_every_cut_reads_every_other(case: tuple[tuple[int, ...], Cut, Cut]) -> None:
    shape, written, read = case
    whole = numbered(shape)
    with tempfile.TemporaryDirectory() as folder:
        reader = store(Path(folder), whole, written)
        assert torch.equal(reader.read_tensor("t"), whole)
        for box, start, stop in pieces(shape, read):
            expected = whole[box.index()].flatten()[start:stop]
            assert torch.equal(reader.read("t", "weight", box, start, stop), expected)


TENSORS = {"experts": numbered((4, 3, 6)), "scale": torch.tensor(7.0)}
KINDS = {"experts": ("momentum_buffer",), "scale": ("exp_avg", "exp_avg_sq")}


def save(run: Path, cut: Cut) -> None:
    save_checkpoint(run, held(cut), header=HEADER, with_moments=True, **UNCOMPARED)


def held(cut: Cut, *, empty: bool = False) -> list[StateSlice]:
    """This rank's slices, with their values (of the n-th moment: n x 100 more) or zeros; the scalar is on rank 0."""
    rank = dist.get_rank()
    places = [("experts", *pieces((4, 3, 6), cut)[rank])] + ([("scale", Box.whole(()), 0, 1)] if rank == 0 else [])
    slices = []
    for name, box, start, stop in places:
        values = TENSORS[name][box.index()].reshape(-1)[start:stop]
        kinds = [torch.zeros_like(values) if empty else values + 100 * n for n in range(len(KINDS[name]) + 1)]
        spec = ShardSpec(tuple(TENSORS[name].shape), box)
        slices.append(StateSlice(name, spec, start, stop, kinds[0], dict(zip(KINDS[name], kinds[1:], strict=True))))
    return slices


def restored(place: Path, cut: Cut) -> bool:
    found, expected = held(cut, empty=True), held(cut)
    restore_slices(CheckpointReader(place), found, with_moments=True)
    return all(
        torch.equal(view, one.tensors()[kind])
        for one, other in zip(expected, found, strict=True)
        for kind, view in other.tensors().items()
    )


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_experts_and_scalars_are_saved_and_restored_with_their_own_kinds(tmp_path: Path, dim: int) -> None:
    run_on_ranks(2, save, tmp_path, (dim, 1, 2) if dim == 1 else (dim, 2, 1))
    place = tmp_path / "step_1"
    tensors = json.loads((place / MANIFEST).read_text())["tensors"]
    assert {name: tuple(tensor["kinds"]) for name, tensor in tensors.items()} == {
        name: ("weight", *kinds) for name, kinds in KINDS.items()
    }
    reader = CheckpointReader(place)
    for name, kinds in KINDS.items():
        for number, kind in enumerate(("weight", *kinds)):
            assert torch.equal(reader.read_tensor(name, kind), TENSORS[name] + 100 * number)
    assert run_on_ranks(3, restored, place, (1, 3, 1)) == [True] * 3


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    run_on_ranks(1, save, tmp_path, (0, 1, 1))
    spec = ShardSpec.of_whole((4, 3, 6))
    adam = StateSlice("experts", spec, 0, 1, torch.zeros(1), {"exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)})
    text = r"holds weight, momentum_buffer of experts, and this run's optimizer keeps weight, exp_avg, exp_avg_sq;"
    with pytest.raises(CheckpointError, match=text):
        restore_slices(CheckpointReader(tmp_path / "step_1"), [adam], with_moments=True)
    restore_slices(CheckpointReader(tmp_path / "step_1"), [adam], with_moments=False)
