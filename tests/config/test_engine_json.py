"""What DeepSpeed is given: no "auto", no optimizer, types by stage, what the JSON says beyond megalm's settings."""

import json

import pytest

from megalm.config.deepspeed.write import engine_json, offloads_optimizer


def test_batch_sizes_multiply_out(load):
    merged = engine_json(load("--global-batch-size 48"), data_parallel_size=3)
    assert merged["train_batch_size"] == 48
    assert merged["train_micro_batch_size_per_gpu"] == 4
    assert merged["gradient_accumulation_steps"] == 4


def test_accumulation_steps_decide_the_batch_where_no_size_is_given(load):
    merged = engine_json(load("--gradient-accumulation-steps 5"), data_parallel_size=2)
    assert (merged["train_batch_size"], merged["gradient_accumulation_steps"]) == (40, 5)


@pytest.mark.parametrize("flag", ["--bf16", "--fp16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_accumulate_and_reduce_in_fp32_from_stage_1(load, flag, stage):
    merged = engine_json(load(flag, f"--zero-stage {stage}"), 1)
    assert merged["data_types"] == {"grad_accum_dtype": "fp32"}
    assert merged["communication_data_type"] == "fp32"
    assert merged["zero_optimization"]["stage"] == stage


def test_stage_0_leaves_data_types_out(load):
    merged = engine_json(load("--bf16 --zero-stage 0"), 1)
    assert "data_types" not in merged
    assert merged["communication_data_type"] == "fp32"
    assert merged["zero_optimization"] == {"stage": 0}


@pytest.mark.parametrize("flags", ["", "--bf16 --grad-accum-dtype model"])
def test_types_are_left_out_for_fp32_and_for_the_models_own_type(load, flags):
    merged = engine_json(load(flags), 1)
    assert "data_types" not in merged
    assert "communication_data_type" not in merged


def test_fp16_block_has_the_loss_scale(load):
    fp16 = engine_json(load("--fp16 --initial-loss-scale 4096 --hysteresis 3 --loss-scale-window 7"), 1)["fp16"]
    assert fp16 == {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 12,
        "loss_scale_window": 7,
        "hysteresis": 3,
        "min_loss_scale": 1,
    }
    assert engine_json(load("--fp16 --loss-scale 128"), 1)["fp16"]["loss_scale"] == 128


def test_what_only_the_json_says_is_kept_and_the_rest_is_decided_by_the_settings(load, write):
    content = {
        "train_batch_size": "auto",
        "disable_python_gc": True,
        "communication_data_type": "bf16",
        "wall_clock_breakdown": True,
        "bf16": {"enabled": "auto", "check_grad_overflow": True},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "zero_optimization": {
            "stage": "auto",
            "allgather_bucket_size": "auto",
            "reduce_bucket_size": 7,
            "offload_optimizer": {"device": "none"},
        },
    }
    write("ds.json", json.dumps(content))
    merged = engine_json(load("--bf16 --zero-stage 2 --deepspeed_config ds.json"), 1)
    assert merged["disable_python_gc"] is True
    assert merged["communication_data_type"] == "bf16"
    assert merged["bf16"] == {"enabled": True}
    assert merged["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 7, "allgather_bucket_size": 50_000_000}
    assert not {"optimizer", "scheduler"} & set(merged)
    assert "auto" not in json.dumps(merged)


def test_steps_are_not_printed_unless_the_json_asks(load):
    assert "steps_per_print" not in engine_json(load(), 1)


def test_the_result_is_fresh_each_time(load, write):
    write("ds.json", '{"zero_optimization": {"reduce_bucket_size": 7}}')
    config = load("--deepspeed_config ds.json")
    engine_json(config, 1)["zero_optimization"]["reduce_bucket_size"] = 8
    assert engine_json(config, 1)["zero_optimization"]["reduce_bucket_size"] == 7


def test_offload_is_told_from_the_json(load, write):
    write("ds.json", '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}')
    config = load("--deepspeed_config ds.json")
    assert offloads_optimizer(config)
    assert engine_json(config, 1)["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert not offloads_optimizer(load())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("flag", ["", "--bf16", "--fp16"])
def test_deepspeed_accepts_the_result(load, stage, flag):
    deepspeed_config = pytest.importorskip("deepspeed.runtime.config")
    merged = engine_json(load(flag, f"--zero-stage {stage} --global-batch-size 8"), 1)
    parsed = deepspeed_config.DeepSpeedConfig(merged)
    assert parsed.zero_optimization_stage == stage
    assert parsed.gradient_accumulation_steps == 2
    assert parsed.steps_per_print is None


def test_ranks_that_share_samples_count_in_deepspeeds_batch_and_not_in_ours(load):
    run = load("--global-batch-size 48")
    shared = run.model_copy(update={"parallel": run.parallel.model_copy(update={"context_parallel_size": 2})})
    merged = engine_json(shared, data_parallel_size=3)
    sizes = (merged["train_micro_batch_size_per_gpu"], merged["gradient_accumulation_steps"], 3 * 2)
    assert merged["train_batch_size"] == sizes[0] * sizes[1] * sizes[2], (
        "DeepSpeed multiplies by all with equal weights"
    )
    assert merged["gradient_accumulation_steps"] == 4
