"""The recipes of published models: their sizes, and the layout that each header suggests."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from megalm.config.deepspeed.write import zero_stage
from megalm.config.merging.load import load
from megalm.config.rules.completion import complete_model
from megalm.config.sections import RunConfig
from megalm.models.families import FAMILIES
from megalm.planner.plan import make_plan
from megalm.planner.schedule import StepTimes
from megalm.testing.processes import REPOSITORY

FOLDER = REPOSITORY / "launch" / "recipes"
HEADER = re.compile(r"# .+\. Layout: (?P<ranks>\d+) ranks, tp (?P<tp>\d+), pp (?P<pp>\d+), zero (?P<zero>\d)")
PARAMETERS = {
    "bert-base": 110_106_428,
    "bert-large": 336_226_108,
    "gemma3-1b": 999_885_952,
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "gpt3-175b": 174_604_259_328,  # 174,600 million in Brown et al. 2020, table D.1
    "llama3-1b": 1_235_814_400,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "pythia-1b": 1_011_781_632,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "roberta-base": 124_697_433,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-11b": 11_307_321_344,
}
"""Elements of the tensors of the published weights, with the heads of pre-training, without padded rows."""
PLANNED = ("gpt2-124m", "t5-small")
"""Those whose memory is worked out at each test; that of the others takes longer than this is worth."""


@dataclass(frozen=True)
class Suggested:
    """What a header says."""

    ranks: int
    tp: int
    pp: int
    zero: int

    @classmethod
    def of(cls, recipe: Path) -> "Suggested":
        found = HEADER.fullmatch(recipe.read_text(encoding="utf-8").splitlines()[0])
        assert found is not None, recipe
        return cls(**{name: int(value) for name, value in found.groupdict().items()})


def on_suggested_ranks(name: str) -> tuple[RunConfig, int]:
    recipe = FOLDER / f"{name}.yaml"
    suggested = Suggested.of(recipe)
    with pytest.raises(SystemExit) as ended:
        load(["--config", str(recipe), "--print-config"])
    assert ended.value.code == 0
    loaded = load(["--config", str(recipe)])
    config, parallel = loaded.on_ranks(suggested.ranks), loaded.config.parallel
    sizes = (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, zero_stage(config))
    assert sizes == (suggested.tp, suggested.pp, suggested.zero), name
    return config.model_copy(update={"model": complete_model(config, None)}), suggested.ranks


def planned(name: str) -> None:
    config, ranks = on_suggested_ranks(name)
    mode = config.recompute.recompute_granularity or "none"
    plan = make_plan(config, ranks, StepTimes(), (mode,))
    assert 1e9 < plan.peak(mode) < 80e9, (name, plan.peak(mode))  # of a GPU of 80 GB


def test_every_recipe_of_a_published_model_is_here() -> None:
    assert {recipe.stem for recipe in FOLDER.glob("*.yaml")} - {
        "quickstart",
        "quickstart-bert",
        "quickstart-electra",
        "quickstart-t5",
    } == set(PARAMETERS)


def test_sizes_are_the_published_ones_on_the_layout_of_the_header() -> None:
    for name, published in PARAMETERS.items():
        model = on_suggested_ranks(name)[0].model
        unpadded = model.model_copy(update={"make_vocab_size_divisible_by": 1})
        assert FAMILIES[model.model_family].num_parameters(unpadded) == published, name


@pytest.mark.parametrize("name", PLANNED)
def test_the_suggested_layout_fits(name: str) -> None:
    planned(name)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(set(PARAMETERS) - set(PLANNED)))
def test_every_other_suggested_layout_fits(name: str) -> None:
    planned(name)
