"""Recipes: order, misplaced and unknown keys, repeated keys, YAML errors."""

import pytest

RECIPE = """\
model:
  num_layers: 6
  normalization: rmsnorm
batch:
  seq_length: 64
optimizer:
  min_lr: 1e-5
"""


def test_flags_override_recipes_and_recipes_override_defaults(load, write):
    config = load("--config", write("a.yaml", RECIPE))
    assert config.model.num_layers == 2
    assert config.model.normalization == "RMSNorm"
    assert config.batch.seq_length == 32


def test_recipes_are_merged_from_left_to_right(load, write):
    first, second = write("a.yaml", "training: {seed: 1, eval_iters: 3}"), write("b.yaml", "training: {seed: 2}")
    training = load(f"--config {first} --config={second}").training
    assert (training.seed, training.eval_iters) == (2, 3)


def test_a_number_with_exponent_and_without_point_is_a_number(load, write):
    assert load("--config", write("a.yaml", RECIPE)).optimizer.min_lr == 1e-5


@pytest.mark.parametrize("number", ["010", "+10", "10", '"10"', "1_0", "'010'"])
def test_numbers_in_recipes_are_those_of_flags(load, write, number):
    config = load("--config", write("a.yaml", f"training:\n  seed: {number}\n"))
    assert config.training.seed == load("--seed " + number.strip("\"'")).training.seed == 10


def test_a_number_of_very_many_digits_is_an_error_of_one_line(problem, write):
    text = problem("--config", write("a.yaml", "training:\n  seed: " + "9" * 200_000))
    assert text.startswith("seed=9999999999999999999999999999999999999999... (200000 characters) (a.yaml:2) must be")
    assert len(text) < 200


@pytest.mark.parametrize("number", ["1e-3", ".001", "1E-3", '"1e-3"', "0.001", "+1e-3"])
def test_small_numbers_too(load, write, number):
    config = load("--config", write("a.yaml", f"optimizer:\n  weight_decay: {number}\n"))
    assert config.optimizer.weight_decay == load("--weight-decay " + number.strip('"')).optimizer.weight_decay == 0.001


def test_null_in_a_recipe_and_none_as_flag_give_the_default_back(load, write):
    first = write("a.yaml", "training: {exit_interval: 5}\ncheckpoint: {save: here}")
    second = write("b.yaml", "training: {exit_interval: null}")
    config = load(f"--config {first} --config {second} --save none")
    assert config.training.exit_interval is None
    assert config.checkpoint.save is None


def test_empty_recipe_and_empty_section_are_fine(load, write):
    assert load("--config", write("a.yaml", "")) == load("--config", write("b.yaml", "model:\n"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modle:\n  num_layers: 3\n", 'a.yaml:1: unknown section "modle"; did you mean "model"?'),
        (
            "model:\n  num_layer: 3\n",
            (
                "model:\n  num_layer: 3\n",
                'a.yaml:2: unknown key "num_layer" in model; did you mean "num_layers" or "mtp_num_layers"?',
            ),
        ),
        ("num_layers: 3\n", "a.yaml:1: num_layers belongs under model:"),
        ("batch:\n  num_layers: 3\n", "a.yaml:2: num_layers belongs under model:, not batch:"),
        ("optimizer:\n  seq_lengt: 3\n", 'a.yaml:2: unknown key "seq_lengt" in optimizer; did you mean "seq_length"?'),
        ("num-layers: 3\n", 'a.yaml:1: "num-layers" is written num_layers in a recipe, under model:'),
        (
            "model:\n  num_key_value_heads: 2\n",
            'a.yaml:2: "num_key_value_heads" is a flag of the peers; in a recipe write num_query_groups under model:',
        ),
        (
            "model:\n  use_rotary_position_embeddings: true\n",
            'a.yaml:2: "use_rotary_position_embeddings" is a flag of the peers; in a recipe write '
            "position_embedding_type: rope under model:",
        ),
        (
            "head_lr_mult: 2\n",
            "a.yaml:1: --head-lr-mult is known in Megatron(-DeepSpeed) but not supported here; use --decoupled-lr, the "
            "rate of token embedding and head",
        ),
        ("model: 3\n", "a.yaml:1: model=3 must be a block of settings, one a line"),
        ("- model\n", "a.yaml: a recipe is a mapping of sections (model, batch, "),
        ("training:\n  seed: 1\n  seed: 2\n", 'a.yaml:3: "seed" stands twice, first on line 2; keep one'),
        (
            "training:\n  seed: 1\ntraining:\n  seed: 1\n",
            'a.yaml:3: "training" stands twice, first on line 1; keep one',
        ),
        ("model: {a: [}\n", "a.yaml:1:13: not YAML: "),
        ("model: !!python/name:os.system\n", "a.yaml:1:8: not YAML: could not determine a constructor"),
        ("training:\n  seed: yes\n", "seed=True (a.yaml:2) must be N, not true or false"),
        ("training:\n  seed: 1:30\n", "seed=1:30 (a.yaml:2) must be a whole number"),
        ("training:\n  seed: 0x10\n", "seed=0x10 (a.yaml:2) must be a whole number"),
        (
            "training:\n  seed: 99999999999999999999\n",
            "seed=1.000000e+20 (a.yaml:2) must be N of at most 18",
        ),
        ("optimizer:\n  weight_decay: .inf\n", "weight_decay=inf (a.yaml:2) must be a finite number"),
        ("checkpoint:\n  save: 2020-01-01\n", "save=2020-01-01 (a.yaml:2) must be a string"),
        ("training:\n  seed: 1.5\n", "seed=1.5 (a.yaml:2) must be a whole number"),
        ("precision:\n  bf16: maybe\n", "bf16=maybe (a.yaml:2) must be true or false"),
    ],
)
def test_wrong_recipe_is_an_error_with_its_place(problem, write, text, expected):
    assert problem("--config", write("a.yaml", text)).startswith(expected)


def test_missing_and_unreadable_recipes_are_errors(problem, write, tmp_path):
    write("b.yaml", "")
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    assert problem("--config no.yaml") == "--config no.yaml cannot be read: No such file or directory"
    assert problem("--config .").startswith("--config . cannot be read: ")
    assert problem("--config c.yaml").startswith("--config c.yaml cannot be read: ")
    assert problem("--config") == "--config needs a value: --config FILE"


def test_anchors_and_merge_keys_work_and_cycles_end(load, problem, write):
    config = load("--config", write("a.yaml", "training:\n  seed: &s 8\nbatch:\n  global_batch_size: *s\n"))
    assert config.batch.global_batch_size == 8
    assert "b.yaml:2: an alias stands inside" in problem("--config", write("b.yaml", "checkpoint:\n  save: &a [*a]\n"))
