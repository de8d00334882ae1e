"""`megalm plan`: what it prints, what it refuses, what it leaves alone."""

import subprocess
import sys

import pytest

from megalm.cli import main
from megalm.config.merging.load import load_config
from megalm.models.gpt.flops import num_parameters
from megalm.planner import plan
from megalm.planner.communication import sent_bytes
from megalm.planner.layout import Layout, parameters
from megalm.planner.schedule import StepTimes

MODEL = (
    "--num-layers 8 --hidden-size 64 --num-attention-heads 4 --num-query-groups 2 --swiglu --normalization RMSNorm "
    "--position-embedding-type rope --disable-bias-linear --untie-embeddings-and-output-weights --vocab-size 256 "
    "--seq-length 32 --micro-batch-size 2 --global-batch-size 32 --train-iters 2 --lr 0.1 --mock-data "
)


def layout(flags: str, world: int) -> Layout:
    return Layout.of(load_config((MODEL + flags).split()), world)


def planned(flags: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["plan", *MODEL.split(), "--num-layers", "4", *flags.split()])
    output = capsys.readouterr()
    return code, output.out + output.err


def test_a_plan_names_grid_memory_communication_and_bubble(capsys) -> None:
    flags = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --world-size 8"
    code, text = planned(flags, capsys)
    assert code == 0
    for expected in ("world 8 = pp 2 x dp 2 x cp 1 x tp 2", "pp 1 dp 1 cp 0:   6   7", "1f1b, 8 micro-batches",
                     "bubble 1", "peak selective", "a token", "sent by a rank"):  # fmt: skip
        assert expected in text


@pytest.mark.long  # three granularities each
@pytest.mark.parametrize("dropout", ["--attention-dropout 0.1 --hidden-dropout 0.1", "--attention-dropout 0.1"])
def test_a_run_with_dropout_has_a_plan(capsys, dropout: str) -> None:
    """Every recompute granularity is measured."""
    code, text = planned(f"{dropout} --tensor-model-parallel-size 2", capsys)
    assert code == 0
    assert "peak full" in text


def test_what_does_not_fit_is_said_with_a_way_out(capsys) -> None:
    code, text = planned("--world-size 2 --memory-per-device 0.001", capsys)
    assert code == 1
    assert "WARNING: will not fit" in text
    assert "--zero-stage 2" in text
    code, text = planned("--world-size 2 --memory-per-device 4", capsys)
    assert code == 0
    assert "fits: " in text


def test_an_impossible_layout_prints_the_equation_and_the_nearest_worlds(capsys) -> None:
    code, text = planned("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 3 --world-size 8", capsys)
    assert code == 2
    assert "world 8 = tp 2 x pp 3" in text
    assert "6 or 12" in text


def test_unknown_flags_are_errors(capsys) -> None:
    code, text = planned("--num-layer 3", capsys)
    assert code == 2
    assert "--num-layers" in text


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved-1f1b", "zbv"])
def test_stages_hold_the_whole_model_together(schedule: str) -> None:
    found = layout(f"--pipeline-model-parallel-size 2 --pipeline-schedule {schedule}", 2)
    held = sum(parameters(found.stages(rank)) for rank in range(2))
    assert held == num_parameters(found.config.model).total


def test_tensor_parallel_ranks_share_all_but_the_norms() -> None:
    found = layout("--tensor-model-parallel-size 2", 2)
    norms = (2 * 8 + 1) * 64
    whole = num_parameters(found.config.model, found.rows * 2).total
    assert 2 * parameters(found.stages(0)) == whole + norms


def test_bytes_sent_are_those_of_the_ring_formulas() -> None:
    one = layout("--zero-stage 0", 4)
    size = parameters(one.stages(0))
    assert sent_bytes(one, size) == {"dp": int(2 * 3 / 4 * size * 4), "tp": 0, "pp": 0}
    two = layout("--tensor-model-parallel-size 2", 2)
    residual = 2 * 32 * 64 * 4
    assert sent_bytes(two, 1)["tp"] == 16 * residual * (4 * 8 + 2)
    stages = layout("--pipeline-model-parallel-size 4", 4)
    assert sent_bytes(stages, 1)["pp"] == 16 * residual * 2


def test_both_ends_of_a_pipeline_send_the_gradient_of_a_tied_table() -> None:
    tied = MODEL.replace("--untie-embeddings-and-output-weights", "")
    residual, table = 2 * 32 * 64 * 4, 256 * 64 * 4
    for schedule, expected in (("1f1b", 16 * residual + table), ("zbv", 2 * 16 * residual)):
        flags = f"{tied} --pipeline-model-parallel-size 2 --pipeline-schedule {schedule}"
        assert sent_bytes(Layout.of(load_config(flags.split()), 2), 1)["pp"] == expected


def test_ranks_that_are_alike_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    original = plan.stage_bytes
    monkeypatch.setattr(plan, "stage_bytes", lambda rank, split: measured.append(1) or original(rank, split))
    found = layout("--pipeline-model-parallel-size 4 --num-layers 16", 4)
    ranks = plan.make_plan(found.config, 4, StepTimes(), ("none",)).ranks
    assert len(measured) == 3
    assert ranks[1].parameters == ranks[2].parameters
    in_flight = [rank.memory["none"].step.saved for rank in ranks]
    assert in_flight[1] == in_flight[2] * 3 / 2


def test_no_process_and_no_deepspeed() -> None:
    code = (
        "import sys; from megalm.cli import main; import torch.distributed as dist; "
        f"assert main(['plan', *{MODEL.split()!r}, '--num-layers', '1', '--world-size', '4']) == 0; "
        "assert 'deepspeed' not in sys.modules; assert not dist.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
