"""No flag of Megatron-LM or Megatron-DeepSpeed is unknown, and no table hides a flag of megalm."""

from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from megalm.config.merging.flags import build_parser, parse_flags
from megalm.config.merging.load import load
from megalm.config.merging.names import IMPLIED, RENAMED, UNSUPPORTED, VALUE_ALIASES, unsupported_text
from megalm.config.merging.nothing import ANY, NO_EFFECT
from megalm.config.merging.recipe import read_recipe
from megalm.config.merging.settings import SETTINGS

# The flags in the argument parsers of Megatron-DeepSpeed and Megatron-LM (August 2026), those that Megatron generates
# from the fields of its configuration classes among them, one a line.
PEER_FLAGS = Path(__file__).with_name("peer_flags.txt").read_text().split()


def own_flags() -> set[str]:
    return {option[2:] for option in build_parser()._option_string_actions if option.startswith("--")}


def test_every_flag_of_the_peers_is_accepted_or_explained():
    own = own_flags()
    names = {name.replace("_", "-") for name in PEER_FLAGS}
    assert [name for name in sorted(names) if name.lower() not in own and unsupported_text(name) is None] == []


def test_no_own_flag_is_called_unsupported():
    patterns = [pattern for names, _ in UNSUPPORTED for pattern in names.split()]
    assert [
        flag for flag in own_flags() - set(NO_EFFECT) if any(fnmatchcase(flag, pattern) for pattern in patterns)
    ] == []


@pytest.mark.parametrize(
    "typo", ["num-layer", "log-intervall", "train-iter", "data-pth", "micro-batchsize", "save-intervl"]
)
def test_a_typo_of_an_own_flag_is_not_taken_for_a_peers_flag(typo):
    assert unsupported_text(typo) is None


def test_aliases_point_to_fields_and_their_values():
    assert set(RENAMED.values()) | {name for name, _ in IMPLIED.values()} | set(VALUE_ALIASES) <= set(SETTINGS)
    for name, value in IMPLIED.values():
        assert SETTINGS[name].convert(value) == value
    for name, words in VALUE_ALIASES.items():
        for word, value in words.items():
            assert SETTINGS[name].convert(word.upper()) == value


def test_what_asks_for_nothing_is_accepted_in_flags_and_recipes_alike(write):
    parser = build_parser()
    for name, nothing in NO_EFFECT.items():
        for value in nothing.values or ("true",):
            word = "7" if value == ANY else value
            said = parse_flags([f"--{name}", word] if nothing.values else [f"--{name}"], parser)
            assert (said.notes, said.problems) == ([f"--{name} has no effect: {nothing.why}"], [])
            key = name.replace("-", "_")
            read = read_recipe(write("a.yaml", f"training:\n  {key}: {word}\n"))
            assert (read.notes, read.problems) == ([f"{key} (a.yaml:2) has no effect: {nothing.why}"], [])
            assert said.needs == read.needs == [name]


@pytest.mark.parametrize("key", ["data_impl: null", "use_flash_attn: false", "num_experts: 1"])
def test_what_is_off_in_a_recipe_asks_for_nothing_too(minimal, write, key):
    load([*minimal, "--config", write("a.yaml", f"{key}\nmodel:\n  {key}\n")])


@pytest.mark.parametrize(
    ("flags", "recipe", "expected"),
    [
        ("--num-experts 8", "num_experts: 8", "mixture-of-experts models are not available in this version"),
        ("--data-impl lazy", "data_impl: lazy", "use infer or mmap, or drop it"),
        ("--expert-model-parallel-size 2", "expert_model_parallel_size: 2", "use 1, or drop it"),
        ("--ds-sequence-parallel-size 4", "ds_sequence_parallel_size: 4", "data parallelism with --zero-stage"),
        ("--no-position-embedding", None, "give --position-embedding-type rope or none"),
        ("--no-position-embedding --position-embedding-type learned_absolute", None, "rope or none, not learned"),
        ("--use-mup", "use_mup: true", "maximal update parametrization is not available"),
        (
            "--zero-stage 0 --use-distributed-optimizer",
            None,
            "--use-distributed-optimizer needs zero_stage >= 1, not 0",
        ),
        (None, "use_flash_attn: 3", "use true, or drop it"),
        ("--data-impl", None, "--data-impl needs a value: --data-impl infer or mmap"),
    ],
)
def test_what_asks_for_something_else_is_refused_in_both(problem, write, flags, recipe, expected):
    if flags:
        assert expected in problem(flags)
    if recipe:
        assert expected in problem("--config", write("a.yaml", f"training:\n  {recipe}\n"))


def test_a_flag_without_effect_and_what_it_relies_on_are_accepted_with_notes(minimal, write):
    recipe = write("a.yaml", "use_distributed_optimizer: true\nmodel:\n  group_query_attention: true\n")
    loaded = load([*minimal, "--num-query-groups", "2", "--data-impl", "mmap", "--config", recipe])
    notes = [note.split(" has no effect")[0] for note in loaded.notes]
    assert notes == ["--data-impl", "use_distributed_optimizer (a.yaml:1)", "group_query_attention (a.yaml:3)"]


def test_no_position_embedding_does_not_take_rotary_ones_away(minimal):
    """Public Mixtral commands give both; Megatron keeps rope."""
    flags = ["--position-embedding-type", "rope", "--no-position-embedding"]
    assert load([*minimal, *flags]).config.model.position_embedding_type == "rope"


def test_flags_without_effect_are_no_fields():
    assert not {name.replace("-", "_") for name in NO_EFFECT} & set(SETTINGS)
