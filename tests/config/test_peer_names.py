"""No flag of Megatron-LM or Megatron-DeepSpeed is unknown, and no table hides a flag of megalm."""

from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from megalm.config.merging.flags import build_parser
from megalm.config.merging.names import IMPLIED, NO_EFFECT, RENAMED, UNSUPPORTED, VALUE_ALIASES, unsupported_text
from megalm.config.merging.settings import SETTINGS

# The flags in the argument parsers of Megatron-DeepSpeed and Megatron-LM (August 2026), one a line.
PEER_FLAGS = Path(__file__).with_name("peer_flags.txt").read_text().split()


def own_flags() -> set[str]:
    return {option[2:] for option in build_parser()._option_string_actions if option.startswith("--")}


def test_every_flag_of_the_peers_is_accepted_or_explained():
    own = own_flags()
    names = {name.replace("_", "-") for name in PEER_FLAGS}
    assert [name for name in sorted(names) if name not in own and unsupported_text(name) is None] == []


def test_no_own_flag_is_called_unsupported():
    patterns = [pattern for names, _ in UNSUPPORTED for pattern in names.split()]
    assert [flag for flag in own_flags() if any(fnmatchcase(flag, pattern) for pattern in patterns)] == []


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


def test_flags_without_effect_are_no_fields():
    assert not {name.replace("-", "_") for name in NO_EFFECT} & set(SETTINGS)
