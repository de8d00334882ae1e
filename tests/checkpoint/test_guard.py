"""What would not be the model's weights is neither published nor gone on from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import start

from megalm.checkpoint.format import Manifest, find_checkpoint
from megalm.checkpoint.resume import check_same_run, check_same_weights, states_of
from megalm.config.merging.load import load_config
from megalm.continuation import ResumePoint, check_restored
from megalm.distributed.fingerprint import MODULUS, fingerprint
from megalm.errors import CheckpointError, MegalmError
from megalm.testing.spawner import run_on_ranks


def test_a_fingerprint_is_the_sum_of_those_of_its_parts_and_tells_places() -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    parts = [fingerprint(values[begin:end], begin) for begin, end in ((0, 7), (7, 100_000), (100_000, 200_000))]
    whole = fingerprint(values)
    assert sum(parts) % MODULUS == whole
    assert fingerprint(values.bfloat16()) == fingerprint(values.bfloat16().float())
    swapped = values.clone()
    swapped[[3, 150_000]] = values[[150_000, 3]]
    assert fingerprint(swapped) != whole
    assert fingerprint(values + 0.0) == whole
    assert fingerprint(values[:0]) == 0


def failures(folder: str, stage: int) -> list[str]:
    """What is said of a state that is moved, or not finite, before a save and after a load."""
    said = []
    run = start(folder, f"--zero-stage {stage} --bf16")  # in fp32 stage 0 has no copies of the weights
    run.step(1)
    run.save()
    for spoil in (_shifted, _infinite):
        run.progress.step += 1
        piece = next(piece for piece in run.engine.state_slices() if piece.weight.numel() > 1)
        before = piece.weight.clone()
        spoil(piece.weight)
        said.append(_error(run.save))
        piece.weight.copy_(before)
    point = ResumePoint(find_checkpoint(Path(folder)), True)
    _shifted(next(piece for piece in run.engine.state_slices() if piece.weight.numel() > 1).weight)
    said.append(_error(lambda: check_restored(run.engine, point)))
    return said


def _shifted(weights: torch.Tensor) -> None:
    weights.copy_(weights.roll(1))


def _infinite(weights: torch.Tensor) -> None:
    weights[0] = float("inf")


def _error(action: Any) -> str:
    with pytest.raises(MegalmError) as caught:
        action()
    return f"{type(caught.value).__name__} {caught.value.exit_code} {caught.value}"


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_other_weights_are_not_published_nor_restored(tmp_path: Path, stage: int) -> None:
    moved, infinite, restored = run_on_ranks(2, failures, str(tmp_path), stage)[0]
    assert moved.startswith("WrongStateError 4")
    assert "is not published: it would hold other weights than the model computes with" in moved
    assert infinite.startswith("NonFiniteError 5")
    assert "is not finite" in infinite
    assert "is not restored" in restored
    assert find_checkpoint(tmp_path) == tmp_path / "step_1"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["step_1"]


def manifest(flags: str = "", states: dict[str, Any] | None = None) -> Manifest:
    """That of a run with these flags."""
    return Manifest(
        step=3,
        layout="",
        config=values(flags),
        identity={"tokenizer": "a" * 12},
        states=states or {},
        files={},
        tensors={},
    )


def values(flags: str) -> dict[str, Any]:
    """The configuration of a run with these flags, as a checkpoint holds it."""
    words = (
        "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 --vocab-size 65 "
        "--mock-data --lr 1e-2 --train-iters 6"
    )
    return load_config([*words.split(), *flags.split()]).model_dump(mode="json")


OTHER_MODELS = [
    "--num-attention-heads 8", "--squared-relu", "--openai-gelu", "--position-embedding-type none", "--kv-channels 32",
    "--position-embedding-type rope", "--normalization RMSNorm", "--num-query-groups 2", "--apply-layernorm-1p",
    "--qk-layernorm", "--vocab-size 66", "--num-layers 3", "--disable-bias-linear", "--rotary-percent 0.5",
]  # fmt: skip


@pytest.mark.parametrize("flags", OTHER_MODELS)
def test_weights_of_another_model_are_refused(flags: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"weights of the checkpoint of step 3 are of another model: model\.\w+ was"
    ):
        check_same_weights(manifest(), values(flags), {})


def test_what_may_be_wanted_with_the_same_weights_is_named() -> None:
    flags = "--rotary-base 500000 --attention-dropout 0.1 --seq-length 64 --norm-epsilon 1e-6 --lr 1 --clip-grad 2"
    named = check_same_weights(manifest(), values(flags), {"tokenizer": "b" * 12})
    assert [text.partition(" ")[0] for text in named] == [
        "model.rotary_base", "model.norm_epsilon", "model.attention_dropout", "batch.seq_length", "the",
    ]  # fmt: skip


SPELLINGS = ["--num-query-groups 4", "--kv-channels 16", "--ffn-hidden-size 256", "--split 969,30,1"]


@pytest.mark.parametrize("flags", SPELLINGS)
def test_a_size_that_is_spelled_out_is_the_same(flags: str) -> None:
    assert check_same_run(manifest(), values(flags), {}) == []
    assert check_same_weights(manifest(), values(flags), {}) == []


SCALER = {"cur_scale": 8.0, "cur_iter": 3, "cur_hysteresis": 1}
CHANGED = [
    ("--loss-scale 1024", {"cur_iter", "cur_hysteresis"}), ("--initial-loss-scale 32", {"cur_iter", "cur_hysteresis"}),
    ("--hysteresis 4", {"cur_scale", "cur_iter"}), ("--loss-scale-window 7 --lr 2", set(SCALER)),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "left"), CHANGED)
def test_a_changed_setting_begins_its_state_anew(flags: str, left: set[str]) -> None:
    before = manifest("--fp16", {"optimizer": {"optimizer_steps": 3, "loss_scaler": SCALER}})
    found = states_of(before, values(f"--fp16 {flags}"))
    assert set(found["optimizer"]["loss_scaler"]) == left
    assert before.states["optimizer"]["loss_scaler"] == SCALER
