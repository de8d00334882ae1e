"""Of equal layers three are measured: the figures are those of all."""

import pytest

from megalm.config.merging.load import load_config
from megalm.config.recompute import RecomputeConfig
from megalm.config.rules.completion import complete_model
from megalm.planner import layout as layout_module
from megalm.planner.plan import make_plan
from megalm.planner.repeats import Block, blocks_of
from megalm.planner.schedule import StepTimes

SMALL = (
    "--hidden-size 32 --num-attention-heads 4 --vocab-size 128 --seq-length 32 --micro-batch-size 2 --lr 0.1 "
    "--global-batch-size 32 --train-iters 2 --mock-data --zero-stage 0 "
)
T5 = (
    "--model-family t5 --objective span --position-embedding-type relative --normalization RMSNorm "
    "--disable-bias-linear"
)
RUNS = {
    "a decoder": ("--num-layers 5", 1, "selective"),
    "groups of two": ("--num-layers 9 --recompute-granularity full --recompute-num-layers 2", 1, "full"),
    "some recomputed": (
        "--num-layers 9 --recompute-granularity full --recompute-method block --recompute-num-layers 4", 1, "full"),
    "windows in a pattern": ("--num-layers 9 --window-size 7,0 --window-attn-skip-freq 2", 1, "none"),
    "a pipeline": ("--num-layers 10 --pipeline-model-parallel-size 2 --tensor-model-parallel-size 2", 4, "none"),
    "a pipeline that takes gradients after each pass": (
        "--num-layers 10 --pipeline-model-parallel-size 2 --zero-stage 1 --bf16", 2, "none"),
    "gradients that wait": ("--num-layers 9 --zero-stage 1", 2, "none"),
    "an encoder-decoder": (f"{T5} --num-layers 6 --decoder-num-layers 5 --hidden-dropout 0.1", 1, "none"),
}  # fmt: skip
IN_MAKE_TEST = ("a decoder", "a pipeline that takes gradients after each pass", "gradients that wait")


@pytest.mark.parametrize(
    "name", [name if name in IN_MAKE_TEST else pytest.param(name, marks=pytest.mark.long) for name in RUNS]
)
def test_memory_is_that_of_all_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags, world, mode = RUNS[name]
    config = load_config((SMALL + flags).split())
    config = config.model_copy(update={"model": complete_model(config, None)})
    short = make_plan(config, world, StepTimes(), (mode,))
    monkeypatch.setattr(layout_module, "blocks_of", lambda kinds, _: [Block(layers=range(len(kinds)))])
    whole = make_plan(config, world, StepTimes(), (mode,))
    assert [rank.memory for rank in short.ranks] == [rank.memory for rank in whole.ranks]


@pytest.mark.parametrize(
    ("kinds", "recompute", "expected"),
    [
        ("", {}, []),
        ("aaa", {}, [("0", 1), ("1", 1), ("2", 1)]),
        ("aaaaaa", {}, [("0", 1), ("1", 4), ("5", 1)]),
        ("aaaabbbbbc", {}, [("0", 1), ("1", 2), ("3", 1), ("4", 1), ("5", 3), ("8", 1), ("9", 1)]),
        ("abababababa", {}, [("01", 1), ("23", 3), ("89", 1), ("10", 1)]),
        ("aaaaaaaaaaa", {"recompute_num_layers": 2}, [("01", 1), ("23", 3), ("89", 1), ("10", 1)]),
    ],
)
def test_which_layers_are_measured(kinds: str, recompute: dict[str, int], expected: list[tuple[str, int]]) -> None:
    granularity = {"recompute_granularity": "full", "recompute_method": "uniform"} if recompute else {}
    found = blocks_of(kinds, RecomputeConfig.model_validate(granularity | recompute))
    numbers = [("".join(map(str, block.layers)), block.times) for block in found]
    assert numbers == expected
