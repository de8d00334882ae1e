"""The learning rate is a function of the step: landmarks by hand, every step against Megatron-LM's code."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.config import OptimizerConfig
from megalm.engine.lr_schedule import learning_rate, warmup_iters

LR, MIN_LR, WARMUP, END = 1.0, 0.1, 10, 110
TO_MIN_LR = ["linear", "cosine", "WSD"]
STYLES = [*TO_MIN_LR, "constant", "inverse-square-root"]
WSD_STYLES = ["linear", "exponential", "cosine", "minus_sqrt"]


def config(**changes: Any) -> OptimizerConfig:
    return OptimizerConfig(**({"lr": LR, "min_lr": MIN_LR, "lr_warmup_iters": WARMUP, "lr_decay_iters": END} | changes))


def rate(step: int, **changes: Any) -> float:
    return learning_rate(step, config(**changes), total_iters=1000)


@pytest.mark.parametrize("style", STYLES)
def test_the_first_step_already_learns(style: str) -> None:
    assert rate(1, lr_decay_style=style) == pytest.approx(LR / WARMUP)
    assert rate(1, lr_decay_style=style, lr_warmup_iters=0) > 0


@pytest.mark.parametrize("style", STYLES)
def test_warmup_is_a_straight_line_that_ends_at_the_full_rate(style: str) -> None:
    assert [rate(step, lr_decay_style=style) for step in range(1, 11)] == pytest.approx([n / 10 for n in range(1, 11)])
    assert rate(WARMUP, lr_decay_style=style) == LR


def test_warmup_starts_from_its_initial_rate() -> None:
    assert rate(5, lr_warmup_init=0.5) == pytest.approx(0.75)
    assert rate(WARMUP, lr_warmup_init=0.5) == LR


@pytest.mark.parametrize(
    ("style", "step", "expected"),
    [
        # 100 steps of decay from 1.0 to 0.1, hence share x 0.9 + 0.1
        ("linear", 35, 0.1 + 0.9 * 0.75),
        ("linear", 60, 0.55),
        ("linear", 109, 0.1 + 0.9 * 0.01),
        ("cosine", 35, 0.1 + 0.9 * (2 + math.sqrt(2)) / 4),
        ("cosine", 60, 0.55),
        ("cosine", 85, 0.1 + 0.9 * (2 - math.sqrt(2)) / 4),
        ("constant", 60, 1.0),
        ("inverse-square-root", 40, 0.5),
        ("inverse-square-root", 90, 1 / 3),
    ],
)
def test_the_decay_follows_its_formula(style: str, step: int, expected: float) -> None:
    assert rate(step, lr_decay_style=style) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("style", "middle"),
    [("linear", 0.5), ("exponential", math.sqrt(2) - 1), ("cosine", 0.5), ("minus_sqrt", 1 - math.sqrt(0.5))],
)
def test_wsd_is_stable_until_its_last_phase(style: str, middle: float) -> None:
    wsd = {"lr_decay_style": "WSD", "lr_wsd_decay_style": style, "lr_wsd_decay_iters": 40}
    assert [rate(step, **wsd) for step in (WARMUP, 50, 70)] == [LR, LR, LR]
    assert MIN_LR < rate(71, **wsd) < LR
    assert rate(90, **wsd) == pytest.approx(MIN_LR + 0.9 * middle)
    assert rate(END, **wsd) == MIN_LR


def test_the_last_phase_of_wsd_is_a_tenth_of_the_decay_unless_given() -> None:
    assert rate(END - 11, lr_decay_style="WSD") == LR
    assert rate(END - 10, lr_decay_style="WSD") < LR


@pytest.mark.parametrize("style", TO_MIN_LR)
def test_the_decay_ends_at_min_lr_and_stays_there(style: str) -> None:
    assert rate(END - 1, lr_decay_style=style) > MIN_LR
    assert [rate(step, lr_decay_style=style) for step in (END, END + 1, 10 * END)] == [MIN_LR] * 3


def test_a_constant_rate_has_no_end() -> None:
    assert rate(10 * END, lr_decay_style="constant") == LR


def test_the_inverse_square_root_does_not_fall_below_min_lr() -> None:
    assert rate(END, lr_decay_style="inverse-square-root", min_lr=0.4) == 0.4


def test_the_decay_ends_with_the_run_unless_told_otherwise() -> None:
    short = config(lr_decay_iters=None, lr_decay_style="linear")
    assert learning_rate(60, short, total_iters=110) == pytest.approx(0.55)
    assert learning_rate(110, short, total_iters=110) == MIN_LR


def test_the_warmup_fraction_is_a_share_of_the_decay() -> None:
    assert warmup_iters(config(lr_warmup_iters=0, lr_warmup_fraction=0.2), total_iters=1000) == 22
    without_end = config(lr_warmup_iters=0, lr_warmup_fraction=0.2, lr_decay_iters=None)
    assert warmup_iters(without_end, total_iters=1000) == 200
    assert rate(22, lr_warmup_iters=0, lr_warmup_fraction=0.2) == LR
    assert rate(11, lr_warmup_iters=0, lr_warmup_fraction=0.2) == pytest.approx(LR / 2)


@given(
    style=st.sampled_from(STYLES),
    wsd_style=st.sampled_from(WSD_STYLES),
    warmup=st.integers(0, 30),
    decay=st.integers(1, 60),
    share=st.floats(0, 1),
)
def test_the_rate_rises_to_the_full_rate_then_never_rises_again(
    style: str, wsd_style: str, warmup: int, decay: int, share: float
) -> None:
    end = warmup + decay
    chosen = config(
        lr_decay_style=style,
        lr_wsd_decay_style=wsd_style,
        lr_warmup_iters=warmup,
        lr_decay_iters=end,
        lr_wsd_decay_iters=max(1, int(share * decay)),
        min_lr=MIN_LR * share,
    )
    rates = [learning_rate(step, chosen, total_iters=end) for step in range(1, end + 20)]
    assert all(0 < value <= LR for value in rates[: end - 1])
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[max(0, warmup - 1) :] == sorted(rates[max(0, warmup - 1) :], reverse=True)
    assert min(rates[warmup:], default=LR) >= chosen.min_lr


PEER_ROWS = [(style, "exponential") for style in STYLES if style != "WSD"] + [("WSD", style) for style in WSD_STYLES]


@pytest.mark.filterwarnings("ignore:Transformer Engine and Apex")
@pytest.mark.parametrize(("style", "wsd_style"), PEER_ROWS)
def test_every_step_is_as_in_megatron(style: str, wsd_style: str) -> None:
    peer = pytest.importorskip("megatron.core.optimizer_param_scheduler", exc_type=ImportError)
    theirs = SimpleNamespace(
        init_lr=0.05, max_lr=LR, min_lr=MIN_LR, lr_warmup_steps=WARMUP, lr_decay_steps=END, lr_decay_style=style,
        wsd_decay_steps=40, lr_wsd_decay_style=wsd_style, num_steps=0,
    )  # fmt: skip
    ours = config(lr_warmup_init=0.05, lr_decay_style=style, lr_wsd_decay_style=wsd_style, lr_wsd_decay_iters=40)
    for theirs.num_steps in range(1, END + 21):
        expected = peer.OptimizerParamScheduler.get_lr(theirs, {})
        assert learning_rate(theirs.num_steps, ours, total_iters=1000) == pytest.approx(expected, rel=1e-12)


def test_the_inverse_square_root_is_min_lr_past_the_end_as_in_megatron() -> None:
    assert rate(END + 1, lr_decay_style="inverse-square-root") == MIN_LR
