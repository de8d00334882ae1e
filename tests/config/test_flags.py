"""Flags: spelling, types, aliases, unknown names."""

import contextlib

import pytest

from megalm.config.merging.flags import build_parser
from megalm.config.merging.load import load as load_with_sources
from megalm.config.merging.load import load_config
from megalm.config.merging.settings import SECTIONS, SETTINGS
from megalm.config.rules.layout import check_layout
from megalm.errors import ConfigError


def test_minimal_flags_give_a_checked_run(load):
    config = load()
    assert config.model.num_layers == 2
    assert config.optimizer.lr == 0.001
    assert config.engine.zero_stage == 1


def test_dash_underscore_and_equals_spellings_are_the_same(load):
    assert load("--ffn_hidden_size 96") == load("--ffn-hidden-size=96") == load("--ffn-hidden_size 96")


def test_switches_have_a_negative_form(load):
    assert load("--bf16").precision.bf16
    assert not load("--bf16 --no-bf16").precision.bf16
    assert load("--disable-bias-linear").model.disable_bias_linear
    assert load("--load x --no-load-optim").checkpoint.no_load_optim
    assert not load("--load x --no-load-optim --load-optim").checkpoint.no_load_optim


def test_the_last_of_equal_flags_counts(load):
    assert load("--seed 1 --seed 2").training.seed == 2


def test_flags_are_never_abbreviated(problem):
    assert problem("--num-lay 3") == 'unknown flag --num-lay; did you mean "--num-layers"?'


def test_unknown_flag_without_a_close_name(problem):
    assert problem("--zzz 3") == "unknown flag --zzz"


def test_all_problems_are_raised_together(problems):
    found = problems("--hidden-size 0 --lr x --zzz --moe-router-topk 2 --min-lr")
    assert len(found) == 5
    assert "hidden_size=0 (--hidden-size) must be greater than or equal to 1" in found
    assert "lr=x (--lr) must be a number" in found
    assert "--min-lr needs a value: --min-lr X" in found


def test_missing_settings_name_flag_and_recipe_key():
    with pytest.raises(ConfigError) as caught:
        load_config([])
    assert "num_layers is missing; give --num-layers N, or num_layers under model: in a recipe" in str(caught.value)
    assert "lr is missing" in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "section", "field", "value"),
    [
        ("--num-key-value-heads 2", "model", "num_query_groups", 2),
        ("--group-query-attention --num-query-groups 2", "model", "num_query_groups", 2),
        ("--layernorm-epsilon 1e-6", "model", "norm_epsilon", 1e-6),
        ("--use-rotary-position-embeddings", "model", "position_embedding_type", "rope"),
        ("--rotary-position-embeddings-theta 5e5", "model", "rotary_base", 5e5),
        ("--normalization rmsnorm", "model", "normalization", "RMSNorm"),
        ("--normalization LAYERNORM", "model", "normalization", "LayerNorm"),
        ("--accumulate-allreduce-grads-in-fp32", "precision", "grad_accum_dtype", "fp32"),
        ("--optimizer AdamW", "optimizer", "optimizer", "adam"),
        ("--muon-use-nesterov", "optimizer", "muon_nesterov", True),
        (
            "--muon-scalar-optimizer adam --muon-no-split-qkv --muon-tp-mode blockwise",
            "optimizer",
            "muon_tp_mode",
            "blockwise",
        ),
        ("--tokenizer-type llama2TOKENIZER", "tokenizer", "tokenizer_type", "Llama2Tokenizer"),
        ("--tokenizer-type HuggingFaceTokenizer", "tokenizer", "tokenizer_type", "HFTokenizer"),
        ("--local_rank=3", "engine", "local_rank", 3),
        ("--exit-duration-in-mins 5", "training", "exit_duration_in_mins", 5.0),
        ("--deepspeed", "engine", "deepspeed", True),
    ],
)
def test_peer_spellings_are_accepted(load, flags, section, field, value):
    assert getattr(getattr(load(flags), section), field) == value


def test_flags_without_effect_are_noted(minimal):
    loaded = load_with_sources([*minimal, "--data-impl", "mmap", "--no-pipeline-parallel"])
    assert [note.split(" has no effect")[0] for note in loaded.notes] == ["--data-impl", "--no-pipeline-parallel"]


def test_what_is_always_so_refuses_the_opposite(problem):
    assert "use single" in problem("--dataloader-type cyclic")


def test_grouped_query_attention_needs_the_number_of_groups(problem):
    assert problem("--group-query-attention") == "num_query_groups is missing; give --num-query-groups N"


def test_the_number_of_groups_may_stand_in_a_recipe(load, write):
    recipe = write("a.yaml", "model:\n  num_query_groups: 2\n")
    assert load(f"--config {recipe} --group-query-attention").model.num_kv_heads == 2


def test_known_but_unsupported_flag_says_what_to_use(problem):
    text = problem("--partition-activations")
    assert text.startswith("--partition-activations is known in Megatron(-DeepSpeed) but not supported here; ")


@pytest.mark.parametrize(
    ("flags", "granularity"),
    [
        ("--recompute-activations", "selective"),
        ("--checkpoint-activations", "full"),
        ("--deepspeed-activation-checkpointing --checkpoint-activations", "full"),
        ("--recompute-granularity selective", "selective"),
        ("--recompute-activations --recompute-granularity none", None),
    ],
)
def test_every_spelling_of_recomputation(load, flags, granularity):
    assert load(flags).recompute.recompute_granularity == granularity


def test_values_of_unsupported_flags_are_not_reported_too(problem):
    assert "--window-size" in problem("--window-size 16 16")


def test_a_pair_is_two_numbers(problem):
    assert "(--window-size) takes two numbers, LEFT,RIGHT" in problem("--window-size 16")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("\u2013bf16", "begins with an en dash (U+2013), not with two hyphens; write --bf16"),
        ("\u2014\u2014bf16", "begins with an em dash (U+2014), not with two hyphens; write --bf16"),
        ("-\u2212seed=3", "begins with a minus sign (U+2212), not with two hyphens; write --seed=3"),
        ("--seed\u00a03", "holds a no-break space (U+00A0); type a blank: --seed 3"),
        ("--seed\u202f3", "holds a narrow no-break space (U+202F); type a blank: --seed 3"),
        ("--bf16\u200b", "holds a zero width space (U+200B); type a blank: --bf16"),
        ("--lr=1e\u22123", "must be a number; it holds a minus sign (U+2212): type it anew"),
        ("--lr=\u201c1e-3\u201d", "must be a number; it holds a left double quotation mark (U+201C): type it anew"),
        ("--seed=\uff14", "must be a whole number; it holds a fullwidth digit four (U+FF14): type it anew"),
        ("--lr-decay-style=cosine\u00a0", "it holds a no-break space (U+00A0): type it anew"),
    ],
)
def test_pasted_characters_are_named(minimal, word, expected):
    with pytest.raises(ConfigError) as caught:
        load_config([*minimal, word])
    assert [problem.endswith(expected) for problem in caught.value.problems] == [True]


def test_pasted_characters_in_values_are_the_users(minimal):
    prompt = "\u2013 a\u00a0b"
    assert load_config([*minimal, "--sample-prompt", prompt]).training.sample_prompt == prompt


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "flag",
    [
        "num-attention-heads",
        "num-layers",
        "hidden-size",
        "global-batch-size",
        "seed",
        "train-samples",
        "seq-length",
        "tensor-model-parallel-size",
        "ffn-hidden-size",
    ],
)
@pytest.mark.parametrize("number", [10**30, 2**63 - 1, 2**30 - 1])
def test_huge_numbers_end_at_once(flag, number, load):
    with contextlib.suppress(ConfigError):
        check_layout(load(f"--{flag} {number}"), 1)


def test_unquoted_values_are_reported(problems):
    assert any('unexpected argument "30,"' in text for text in problems("--split 969, 30, 1"))


def test_a_switch_takes_no_value(problem):
    assert problem("--bf16=yes") == '--bf16 takes no value, not "yes"; write --bf16, or --no-bf16 for false'


def test_a_wrong_choice_lists_the_choices(problem):
    text = problem("--lr-decay-style cosin")
    assert "lr_decay_style=cosin (--lr-decay-style) must be one of constant, linear, cosine" in text
    assert 'did you mean "cosine"?' in text


@pytest.mark.parametrize("value", ["nan", "inf", "1e999"])
def test_numbers_must_be_finite(problems, value):
    assert problems(f"--weight-decay {value}")


def test_negative_and_exponent_numbers_are_values(problem, load):
    assert "weight_decay=-1" in problem("--weight-decay -1")
    assert load("--weight-decay 1e-2").optimizer.weight_decay == 0.01


def test_help_shows_every_setting_with_help_text_and_default():
    text = " ".join(build_parser().format_help().split())
    for setting in SETTINGS.values():
        assert setting.flag in text
        assert setting.help[:20] in text.replace("- ", "-")
    assert "--log-interval N Steps between two lines" in text
    assert "Default: 10." in text


def test_every_field_name_is_used_once_over_all_sections():
    assert sum(len(cls.model_fields) for cls in SECTIONS.values()) == len(SETTINGS)


def test_every_setting_has_a_help_text():
    assert [name for name, setting in SETTINGS.items() if len(setting.help) < 10] == []


def test_help_exits_with_zero(capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"])
    assert caught.value.code == 0
    assert "--num-layers" in capsys.readouterr().out


def test_vocab_size_gives_the_ids_of_a_tokenizer_without_files() -> None:
    line = "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 8 --micro-batch-size 1 --train-iters 1 "
    line += "--lr 1 --mock-data --vocab-size 50 --tokenizer-type "
    null = load_config((line + "NullTokenizer").split())
    assert (null.tokenizer.tokenizer_vocab_size, null.model.vocab_size) == (50, None), "the model has one id more"
    both = load_config((line + "NullTokenizer --tokenizer-vocab-size 40").split())
    assert (both.tokenizer.tokenizer_vocab_size, both.model.vocab_size) == (40, 50)
    tik = load_config((line + "TikTokenizer").split())
    assert (tik.tokenizer.tokenizer_vocab_size, tik.model.vocab_size) == (50, 50)
    other = load_config((line + "ByteLevelTokenizer").split())
    assert (other.tokenizer.tokenizer_vocab_size, other.model.vocab_size) == (None, 50)
