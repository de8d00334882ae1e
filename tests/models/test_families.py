"""The table of families: nobody outside knows one by its own module, and another one can be added."""

import ast
from pathlib import Path

import pytest
import torch

import megalm
from megalm.config.model import ModelConfig
from megalm.errors import ConfigError
from megalm.models.families import FAMILIES
from megalm.parallel.apply import check_plan
from megalm.parallel.plans import PLANS

ROOT = Path(megalm.__file__).parent


def test_every_family_has_a_sharding_plan(style_config: ModelConfig) -> None:
    assert set(FAMILIES) == set(PLANS)
    for name in FAMILIES:
        check_plan(style_config.model_copy(update={"model_family": name}), PLANS[name])


def test_a_family_is_found_by_its_name_only() -> None:
    found = []
    for path in ROOT.rglob("*.py"):
        place = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("megalm.models.gpt."):
                found.append(place)
    assert {place for place in found if not place.startswith("models/gpt/")} == {"models/families.py"}


def test_shared_parameters_are_those_that_the_end_needs_of_the_beginning(style_config: ModelConfig) -> None:
    family = FAMILIES["gpt"]
    with torch.device("meta"):
        first = family.build(style_config, layers=[0], has_head=False)
        last = family.build(style_config, layers=[1], has_embedding=False)
    names = [{name for name, _ in stage.named_parameters()} for stage in (first, last)]
    assert set(family.shared_parameters(style_config)) == names[0] & names[1]


def test_an_unknown_family_is_named_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"model_family=gtp must be one of gpt"):
        FAMILIES["gtp"]
