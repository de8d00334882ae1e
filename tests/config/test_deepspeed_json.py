"""The DeepSpeed JSON: syntax, unknown and refused keys, facts that fill, contradictions that name both places."""

import json

import pytest

from megalm.config.deepspeed.read import key_lines
from megalm.config.deepspeed.write import engine_json


@pytest.fixture
def with_json(write):
    """Writes ds.json; gives the flag that names it."""

    def call(content) -> str:
        write("ds.json", content if isinstance(content, str) else json.dumps(content, indent=1))
        return "--deepspeed_config ds.json"

    return call


def test_facts_of_the_json_fill_what_nobody_gave(load, with_json):
    config = load(
        with_json(
            {
                "train_batch_size": 16,
                "train_micro_batch_size_per_gpu": 4,
                "gradient_accumulation_steps": 2,
                "gradient_clipping": 0.5,
                "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 10, "hysteresis": 3},
                "data_types": {"grad_accum_dtype": "fp16"},
                "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e7},
                "optimizer": {"type": "AdamW", "params": {"betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.2}},
            }
        )
    )
    assert (config.batch.global_batch_size, config.batch.gradient_accumulation_steps) == (16, 2)
    assert config.optimizer.clip_grad == 0.5
    assert (config.optimizer.adam_beta1, config.optimizer.adam_beta2, config.optimizer.adam_eps) == (0.8, 0.9, 1e-6)
    assert config.optimizer.weight_decay == 0.2
    assert config.precision.fp16
    assert config.precision.loss_scale is None
    assert (config.precision.initial_loss_scale, config.precision.hysteresis) == (1024.0, 3)
    assert config.precision.grad_accum_dtype == "model"
    assert config.engine.zero_stage == 2
    assert config.engine.deepspeed_config == {"zero_optimization": {"reduce_bucket_size": 5e7}}


def test_the_json_names_the_optimizer(load, with_json):
    lion = load(with_json({"optimizer": {"type": "Lion", "params": {"betas": [0.8, 0.9]}}})).optimizer
    assert (lion.optimizer, lion.lion_beta1, lion.lion_beta2, lion.adam_beta1) == ("lion", 0.8, 0.9, 0.9)
    muon = load(with_json({"optimizer": {"type": "Muon", "params": {"momentum": 0.8}}})).optimizer
    assert (muon.optimizer, muon.muon_momentum) == ("muon", 0.8)


@pytest.mark.parametrize("optimizer", ["Adam", "Lion", "Muon"])
def test_every_optimizer_runs_in_host_memory_without_deepspeeds(load, with_json, optimizer):
    offloaded = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    config = load(with_json(offloaded | {"optimizer": {"type": optimizer}}))
    assert config.optimizer.optimizer == optimizer.lower()
    assert engine_json(config, 2)["zero_force_ds_cpu_optimizer"] is False


def test_json_supplies_required_settings(write):
    from megalm.config.merging.load import load_config

    write("ds.json", '{"train_micro_batch_size_per_gpu": 3, "optimizer": {"type": "Adam", "params": {"lr": 0.1}}}')
    words = "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 8 --train-iters 1 --mock-data"
    config = load_config([*words.split(), "--deepspeed_config", "ds.json"])
    assert (config.batch.micro_batch_size, config.optimizer.lr) == (3, 0.1)


def test_auto_and_null_are_the_same_as_absent(load, with_json):
    auto = {
        "train_batch_size": "auto",
        "gradient_clipping": None,
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
    }
    assert load(with_json(auto)) == load()


def test_a_block_in_a_recipe_is_the_same_as_a_file(load, with_json, write):
    block = "engine:\n  deepspeed_config:\n    zero_optimization:\n      stage: 3\n      reduce_bucket_size: 5e7\n"
    flag = with_json({"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e7}})
    assert load("--config", write("a.yaml", block)) == load(flag)


def test_problems_in_a_recipes_block_have_its_lines(problem, write):
    text = "engine:\n  deepspeed_config:\n    zero_optimization:\n      stag: 3\n"
    expected = 'a.yaml:4: DeepSpeed knows no key "stag" in "zero_optimization"; did you mean "stage"?'
    assert problem("--config", write("a.yaml", text)) == expected


def test_contradiction_with_a_flag_names_both_places_and_values(problem, with_json):
    assert problem(with_json('{\n "train_micro_batch_size_per_gpu": 8\n}')) == (
        "micro_batch_size=4 (--micro-batch-size) but train_micro_batch_size_per_gpu=8 (ds.json:2); "
        'say it once, or write "auto" in the DeepSpeed JSON'
    )


@pytest.mark.parametrize(
    ("flags", "content"),
    [
        ("--no-bf16", {"bf16": {"enabled": True}}),
        ("--fp16", {"fp16": {"enabled": False}}),
        ("--clip-grad 1", {"gradient_clipping": 2.0}),
        ("--zero-stage 1", {"zero_optimization": {"stage": 2}}),
        ("--global-batch-size 8", {"train_batch_size": 16}),
        ("--adam-beta2 0.9", {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}}),
        ("--fp16 --loss-scale 128", {"fp16": {"loss_scale": 0}}),
        ("--fp16 --initial-loss-scale 4", {"fp16": {"initial_scale_power": 3}}),
        ("--bf16 --accumulate-allreduce-grads-in-fp32", {"data_types": {"grad_accum_dtype": "bf16"}}),
    ],
)
def test_each_fact_said_twice_must_agree(problem, with_json, flags, content):
    text = problem(flags, with_json(content))
    assert " but " in text
    assert "(ds.json:" in text


def test_a_recipe_contradicts_too_unless_a_flag_overrides_it(problem, load, with_json, write):
    recipe = write("a.yaml", "optimizer:\n  clip_grad: 2\n")
    flag = with_json({"gradient_clipping": 1.0})
    assert problem(f"--config {recipe}", flag).startswith(
        "clip_grad=2.0 (a.yaml:2) but gradient_clipping=1.0 (ds.json:2)"
    )
    assert load(f"--config {recipe} --clip-grad 1", flag).optimizer.clip_grad == 1.0


def test_equal_facts_in_both_places_are_fine(load, with_json):
    config = load("--bf16 --zero-stage 2", with_json({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}))
    assert config.precision.bf16


def test_loss_scale_of_a_disabled_fp16_block_is_not_taken(load, with_json):
    assert load("--bf16", with_json({"fp16": {"enabled": False, "loss_scale": 128}})).precision.loss_scale is None


def test_fp16_in_json_and_bf16_as_flag_exclude_each_other(problem, with_json):
    text = problem("--bf16", with_json({"fp16": {"enabled": True}}))
    assert "exclude each other" in text
    assert "bf16: --bf16, fp16: ds.json:3" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"bf16": {"enabled": true},}', "ds.json:1:2"),
        ('{\n "train_batch_size": 8\n "x": 1}', "ds.json:3:2: not JSON: Expecting ',' delimiter"),
        ("[1]", "ds.json: a DeepSpeed configuration is a JSON object {...}"),
        ('{"gradient_clipping": NaN}', "ds.json: NaN is not a JSON number; give a finite number"),
        (
            '{"bf16": {\n"enabled": true,\n"enabled": false}}',
            'ds.json:3: "bf16.enabled" stands twice, first on line 2; keep one',
        ),
        ('{"gradient_clipp1ng": 1}', 'ds.json:1: DeepSpeed knows no key "gradient_clipp1ng"; did you mean'),
        (
            '{"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}',
            'ds.json:1: DeepSpeed knows no key "devise"',
        ),
        ('{"reduce_bucket_size": 1}', 'DeepSpeed knows no key "reduce_bucket_size"; it belongs in "zero_optimization"'),
        ('{"bf16": {"gradient_clipping": 1}}', "it belongs at the top level"),
        ('{"gradient_clipping": "1.0"}', 'ds.json:1: gradient_clipping="1.0" must be a number'),
        ('{"zero_optimization": true}', "zero_optimization=true must be a block {...}"),
        ('{"zero_optimization": {"reduce_bucket_size": -1}}', "reduce_bucket_size=-1 must be a whole number"),
        (
            '{"zero_optimization": {"stage": 4}}',
            "zero_optimization.stage=4: zero_stage must be less than or equal to 3",
        ),
        ('{"elasticity": {"enabled": true}}', '"elasticity" was removed from DeepSpeed; '),
        ('{"zero_optimization": {"mics_shard_size": 2}}', "was removed from DeepSpeed; there is no replacement"),
        ('{"scheduler": {"type": "OneCycle"}}', "not supported here; use --lr-decay-style"),
        ('{"pipeline": {"stages": 2}}', "not supported here; use --pipeline-model-parallel-size"),
        ('{"autotuning": {"enabled": true}}', "not supported here"),
        ('{"tensor_parallel": {"preset_model": "llama"}}', "not supported here; megalm's own layers"),
        ('{"optimizer": {"type": "Lamb"}}', 'optimizer.type="Lamb" is not supported here; use "AdamW"'),
        (
            '{"optimizer": {"type": "Muon", "params": {"muon_lr": 0.02}}}',
            "not supported here; all parameters share --lr",
        ),
        ('{"optimizer": {"type": "Adam", "params": {"betas": [0.9]}}}', "betas=[0.9] must be two numbers"),
        ('{"optimizer": {"type": "Adam", "params": {"adam_w_mode": false}}}', "always decoupled"),
        ('{"managed_gradient_accumulation": false}', "not supported here"),
        ('{"zero_optimization": {"compute_grad_norm": false}}', "not supported here"),
        ('{"gradient_allreduce_op": "sum"}', "not supported here"),
        ('{"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}', 'only "cpu" is supported'),
    ],
)
def test_wrong_json_is_an_error_with_its_place(problem, with_json, text, expected):
    found = problem(with_json(text))
    assert found.startswith("ds.json")
    assert expected in found


def test_a_missing_json_is_an_error(problem):
    assert problem("--deepspeed_config no.json") == "deepspeed_config=no.json cannot be read: No such file or directory"


@pytest.mark.parametrize(
    "content",
    [
        {"tensorboard": {"enabled": False}},
        {"gradient_allreduce_op": "mean"},
        {"managed_gradient_accumulation": True},
        {"optimizer": {"type": "AdamW", "params": {"adam_w_mode": True, "torch_adam": True}}},
        {"zero_optimization": {"offload_optimizer": {"device": "none"}}},
        {"torch_autocast": {"enabled": "auto"}},
    ],
)
def test_refused_keys_are_accepted_where_they_ask_for_nothing(load, with_json, content):
    load(with_json(content))


def test_problems_of_json_and_flags_come_together(problems, with_json):
    assert (
        len(problems("--zzz --hidden-size 0", with_json('{"zzz": 1, "gradient_clipping": -1, "train_batch_size": 0}')))
        == 5
    )


def test_lines_of_keys_survive_strings_lists_and_escapes():
    text = '{"a": "}: {\\"",\n "b": [{"c": 1}, {"c": 2}],\n "d\\u0065": {"c":\n 3}}'
    lines = dict(key_lines(text))
    assert [line for path, line in lines.items() if path[-1] == "c"] == [2, 2, 3]
    assert lines["de", "c"] == 3
    assert len(list(key_lines(text))) == len(lines) == 6
