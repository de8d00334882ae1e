"""Checkpoints of earlier formats are read as if they were of this one.

data/format_2 was written by the last version of format 2, after two steps of runs of `FLAGS`, with `value` in place of
every number of weights and moments.
"""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from small_run import IDENTITY, start

from megalm.checkpoint.format import FORMAT, MANIFEST, Manifest
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.resume import check_same_run
from megalm.storage.durable import sha256_of
from megalm.testing.spawner import run_on_ranks

DATA = Path(__file__).parent / "data" / "format_2"
LAYOUTS = ("tp2", "pp2", "tp2_zero1")
KINDS = ("weight", "exp_avg", "exp_avg_sq")
FLAGS = "--num-layers 2 --hidden-size 4 --ffn-hidden-size 6 --vocab-size 9 --hidden-dropout 0 --attention-dropout 0"


def value(name: str, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    """What stands in the fixtures: every element has its own number."""
    first = zlib.crc32(name.encode()) % 1000 * 1000 + 100 * KINDS.index(kind)
    return torch.arange(first, first + torch.Size(shape).numel(), dtype=torch.float32).view(shape)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_of_format_2_is_read(layout: str) -> None:
    reader = CheckpointReader(DATA / layout)
    assert {name.split(".")[1] for name in reader.names if name.startswith("layers.")} == {"0", "1"}
    assert reader.shape("embedding.tokens.weight") == (9, 4)
    for name in reader.names:
        for kind in KINDS:
            assert torch.equal(reader.read_tensor(name, kind), value(name, kind, reader.shape(name))), (name, kind)


def test_a_manifest_of_format_2_is_one_of_this_format() -> None:
    manifest = Manifest.read(DATA / "tp2_zero1")
    assert (manifest.format, manifest.step) == (FORMAT, 2)
    assert manifest.states == {
        "progress": {
            "step": 2, "consumed_samples": 12, "skipped_iterations": 3, "nan_iterations": 4, "bad_in_a_row": 1
        },
        "optimizer": {"optimizer_steps": 2, "loss_scaler": {}},
        "order": {},
    }  # fmt: skip
    assert json.loads(manifest.to_json())["tensors"]["layers.0.mlp.w_down.weight"] == {
        "shape": [4, 6],
        "kinds": list(KINDS),
        "slices": [
            {"file": "rank_00002.safetensors", "offsets": [0, 0], "sizes": [4, 3], "start": 0, "stop": 12},
            {"file": "rank_00003.safetensors", "offsets": [0, 3], "sizes": [4, 3], "start": 0, "stop": 12},
        ],
    }


def wrong_after_restore(folder: str, flags: str) -> list[str]:
    """What this rank has otherwise than the fixtures, restored from each."""
    wrong = []
    for layout in LAYOUTS:
        run = start(folder, f"{FLAGS} {flags}", DATA / layout)
        assert run.progress.state().items() <= Manifest.read(DATA / layout).states["progress"].items()
        assert run.progress.bad_in_a_row == 0, "they count anew"
        assert run.engine.scalars.state() == {"optimizer_steps": 2, "loss_scaler": {}}
        check_same_run(Manifest.read(DATA / layout), run.config.model_dump(mode="json"), IDENTITY)
        for piece in run.engine.state_slices():
            spec = piece.shard_spec
            for kind, view in piece.tensors().items():
                held = value(piece.name, kind, spec.shape)[spec.box.index()].flatten()[piece.start : piece.stop]
                if not torch.equal(view, held):
                    wrong.append(f"{layout} on rank {dist.get_rank()}: {kind} {piece.name}")
    return wrong


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, "--zero-stage 3"),
        pytest.param(1, "--zero-stage 0", marks=pytest.mark.long),
        pytest.param(2, "--zero-stage 1 --tensor-model-parallel-size 2", marks=pytest.mark.long),
        (4, "--zero-stage 2 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    ],
)
def test_every_layout_goes_on_from_format_2(tmp_path: Path, ranks: int, flags: str) -> None:
    assert run_on_ranks(ranks, wrong_after_restore, str(tmp_path), flags) == [[]] * ranks


def test_format_1_stored_vocabulary_tables_with_their_padding(tmp_path: Path) -> None:
    name, padded = "head.weight", torch.arange(12.0).view(4, 3)  # of which the last row is padding
    pieces, files = [], {}
    for number, (first, last) in enumerate([(0, 5), (5, 12)]):
        save_file({f"weight/{name}": padded.flatten()[first:last].clone()}, tmp_path / f"{number}")
        pieces.append({"file": f"{number}", "start": first, "stop": last})
        path = tmp_path / f"{number}"
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path), "rank": number}
    values: dict[str, Any] = {
        "format": 1, "megalm": "0.1.0", "step": 3, "consumed_samples": 24, "layout": "world 2",
        "config": {"model": {"vocab_size": 3}}, "identity": {}, "files": files,
        "scalars": {"kinds": ["weight"], "optimizer": {"optimizer_steps": 3}, "progress": {"nan_iterations": 1}},
        "tensors": {name: {"shape": [4, 3], "slices": {"weight": pieces}}},
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    (tmp_path / MANIFEST).write_text(json.dumps({**values, "sha256": digest}))
    reader = CheckpointReader(tmp_path)
    assert torch.equal(reader.read_tensor(name), padded[:3])
    assert reader.manifest.states["progress"] == {"step": 3, "consumed_samples": 24, "nan_iterations": 1}
    assert not reader.has_optimizer_state
