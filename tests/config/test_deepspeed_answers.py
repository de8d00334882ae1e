"""Every key of DeepSpeed's JSON has one answer; what asks for nothing loads, what megalm does not do is refused."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from megalm.config.deepspeed.answers import HANDED, NO_EFFECT_JSON, REMOVED, UNSUPPORTED_JSON
from megalm.config.deepspeed.read import FACTS
from megalm.config.deepspeed.vocabulary import VOCABULARY
from megalm.config.merging.load import load as load_all

OWN = {"optimizer.params.betas", "tensorboard.enabled", "tensorboard.output_path", "tensorboard.job_name"}
"""Said by settings of megalm's own, otherwise than one by one."""
MODERN = {"bfloat16", *(f"zero_optimization.cpu_offload{rest}" for rest in ("", "_param", "_use_pin_memory"))}
"""Read under their present names."""


def leaves(block: dict[str, Any], above: str = "") -> Iterator[str]:
    for key, kind in block.items():
        path = f"{above}{key}"
        yield from leaves(kind, f"{path}.") if isinstance(kind, dict) else [path]


def answers(path: str) -> list[str]:
    """The tables that say something about a key, or about a block that it is in."""
    words = path.split(".")
    paths = {".".join(words[: number + 1]) for number in range(len(words))}
    tables = {
        "setting": {fact.path for fact in FACTS} | OWN,
        "removed": set(REMOVED),
        "refused": set(UNSUPPORTED_JSON),
        "no effect": set(NO_EFFECT_JSON),
        "DeepSpeed's": set(HANDED),
        "renamed": MODERN,
    }
    return [name for name, known in tables.items() if paths & known]


@pytest.mark.parametrize("path", sorted(leaves(VOCABULARY)))
def test_every_key_has_one_answer(path: str) -> None:
    assert len(answers(path)) == 1, answers(path)


@pytest.fixture
def loaded(minimal, write):
    """Loads the minimal command line with a JSON of this content and more flags."""

    def call(content: dict[str, Any], *flags: str):
        write("ds.json", json.dumps(content, indent=1))
        return load_all([*minimal, "--deepspeed_config", "ds.json", *flags])

    return call


OFF = [
    {"amp": {"enabled": False, "opt_level": "O1"}},
    {"elasticity": {"enabled": False, "max_train_batch_size": 2000, "micro_batch_sizes": [2, 4]}},
    {"sparse_gradients": False},
    {"sparse_attention": {}},
    {"eigenvalue": {"enabled": False, "max_iter": 100}},
    {"progressive_layer_drop": {"enabled": False, "theta": 0.5}},
    {"curriculum_learning": {"enabled": False, "curriculum_type": "seqlen"}},
    {"quantize_training": {"enabled": False, "quantize_verbose": True}},
    {"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": False}, "different_groups": {
        "wq1": {"params": {"start_bits": 8}}}}, "layer_reduction": {"enabled": False}}},
    {"data_efficiency": {"enabled": False, "seed": 1234}},
    {"data_efficiency": {"enabled": True, "data_sampling": {"enabled": False}, "data_routing": {"enabled": False}}},
    {"activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False, "profile": False,
                                  "contiguous_memory_optimization": False, "number_checkpoints": None}},
    {"flops_profiler": {"enabled": False, "profile_step": 1, "module_depth": -1, "top_modules": 1, "detailed": True}},
    {"tensorboard": {"enabled": False, "output_path": "x"}}, {"wandb": {"enabled": False, "project": "x"}},
    {"csv_monitor": {"enabled": False}}, {"comet": {"enabled": False}}, {"comms_logger": {"enabled": False}},
    {"autotuning": {"enabled": False, "fast": True}}, {"hybrid_engine": {"enabled": False, "max_out_tokens": 512}},
    {"compile": {"deepcompile": False, "double_buffer": True}}, {"torch_autocast": {"enabled": False}},
    {"pipeline": {"stages": "auto", "partition": "best", "seed_layers": False, "activation_checkpoint_interval": 0}},
    {"tensor_parallel": {"autotp_size": 0}}, {"sequence_parallel_size": 1}, {"nebula": {"enabled": False}},
    {"checkpoint": {"load_universal": False, "use_node_local_storage": False}}, {"datastates_ckpt": {}},
    {"zero_optimization": {"zenflow": None, "cpu_offload": False, "offload_param": {"device": "none"}}},
    {"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}}},
    {"optimizer": {"type": "AdamW", "params": {"adam_w_mode": True, "bias_correction": True, "amsgrad": False}}},
    {"expert_parallel": {}}, {"weight_quantization": {"quantized_initialization": {}}}, {"dump_state": False},
]  # fmt: skip


@pytest.mark.parametrize("content", OFF, ids=lambda content: next(iter(content)))
def test_what_asks_for_nothing_is_taken_out_without_a_word(loaded, content: dict[str, Any]) -> None:
    result = loaded(content)
    kept = result.config.engine.deepspeed_config or {}
    assert kept in ({}, {"zero_optimization": {"offload_param": {"device": "none"}}})
    assert result.notes == []


IDLE = [
    ({"steps_per_print": 10}, "steps_per_print"),
    ({"wall_clock_breakdown": True}, "wall_clock_breakdown"),
    ({"aio": {"block_size": 1048576, "queue_depth": 8, "single_submit": False}}, "aio"),
    ({"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": True}}, "gather_16bit_weights"),
    ({"checkpoint": {"tag_validation": "Fail"}}, "tag_validation"),
    ({"zero_optimization": {"stage": 1, "stage3_max_live_parameters": 1e9}}, "at ZeRO stage 1"),
    ({"prescale_gradients": True, "zero_optimization": {"stage": 1}}, None),
]


@pytest.mark.parametrize(("content", "word"), IDLE)
def test_what_changes_nothing_is_said(loaded, content: dict[str, Any], word: str | None) -> None:
    notes = loaded(content).notes
    assert len(notes) == (word is not None)
    assert all(note.startswith("ds.json:") and "has no effect" in note and str(word) in note for note in notes)


REFUSED = [
    ({"optimizer": {"type": "OneBitAdam", "params": {"lr": 1e-3, "freeze_step": 2}}}, 'type="OneBitAdam" is not'),
    ({"optimizer": {"type": "Adam", "params": {"lr": 1e-3, "freeze_step": 2}}}, "is a setting of OneBitAdam"),
    ({"flops_profiler": {"enabled": True}}, "no module is profiled"),
    ({"activation_checkpointing": {"cpu_checkpointing": True}}, "use --recompute-granularity"),
    ({"data_efficiency": {"enabled": True, "data_sampling": {"enabled": True}}}, "by --seed"),
    ({"zero_optimization": {"stage": 2}, "prescale_gradients": True}, "not supported at ZeRO stage 2"),
    ({"zero_optimization": {"stage": 3}, "gradient_predivide_factor": 2.0}, "not supported at ZeRO stage 3"),
    ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "for CUDA only"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}}, "is a logarithmic warmup"),
    ({"scheduler": {"type": "WarmupLR", "params": {}}}, "means 1000 steps"),
    ({"gradient_clipping": 1e300}, "must be a number, not as large as 2^63"),
    ({"communication_data_type": "int8"}, 'must be one of "fp32"'),
    ({"zero_optimization": {"reduce_bucket_size": 0}}, "must be at least 1"),
    ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "is always skipped"),
]


@pytest.mark.parametrize(("content", "reason"), REFUSED)
def test_what_megalm_does_not_do_is_refused_with_its_place(
    problem, write, content: dict[str, Any], reason: str
) -> None:
    write("ds.json", json.dumps(content, indent=1))
    found = problem("--deepspeed_config ds.json")
    assert found.startswith("ds.json:")
    assert reason in found


def test_what_megalm_does_too_becomes_its_setting(loaded) -> None:
    content = {
        "scheduler": {"type": "WarmupDecayLR", "params": {
            "warmup_max_lr": 1e-3, "warmup_num_steps": 3, "warmup_type": "linear", "total_num_steps": 9}},
        "tensorboard": {"enabled": True, "output_path": "logs", "job_name": "one"},
        "tensor_parallel": {"autotp_size": 2},
        "zero_optimization": {"stage": 2, "cpu_offload": True, "cpu_offload_use_pin_memory": True},
        "bfloat16": {"enabled": True},
    }  # fmt: skip
    result = loaded(content)
    config = result.config
    assert (config.optimizer.lr_decay_style, config.optimizer.lr_warmup_iters) == ("linear", 3)
    assert config.optimizer.lr_decay_iters == 9
    assert config.logging.tensorboard_dir == "logs/one"
    assert config.parallel.tensor_model_parallel_size == 2
    assert config.precision.bf16
    offload = {"device": "cpu", "pin_memory": True}
    assert config.engine.deepspeed_config == {"zero_optimization": {"offload_optimizer": offload}}
    assert [note for note in result.notes if "step N + 2" in note] == result.notes


def test_a_flag_wins_over_the_json_of_a_recipe_and_says_so(minimal, write) -> None:
    write("ds.json", '{"zero_optimization": {"stage": 1}}')
    write("a.yaml", "engine: {deepspeed_config: ds.json}\n")
    result = load_all([*minimal, "--config", "a.yaml", "--zero-stage", "2"])
    assert result.config.engine.zero_stage == 2
    assert result.notes == ["zero_stage=2 (--zero-stage) replaces zero_optimization.stage=1 (ds.json:1)"]
