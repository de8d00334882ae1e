"""The learning rate is a function of the step: landmarks by hand, every step against Megatron-LM's code."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.config.lengths import Lengths
from megalm.config.training import BatchConfig, OptimizerConfig, TrainingConfig
from megalm.engine.lr_schedule import learning_rate, step_settings, weight_decay

LR, MIN_LR, WARMUP, END = 1.0, 0.1, 10, 110
SEQ = 8
TO_MIN_LR = ["linear", "cosine", "WSD"]
STYLES = [*TO_MIN_LR, "constant", "inverse-square-root"]
WSD_STYLES = ["linear", "exponential", "cosine", "minus_sqrt"]


def config(**changes: Any) -> OptimizerConfig:
    return OptimizerConfig(**({"lr": LR, "min_lr": MIN_LR, "lr_warmup_iters": WARMUP, "lr_decay_iters": END} | changes))


def lengths(optimizer: OptimizerConfig, total: int = 1000, global_batch_size: int = 1, **training: Any) -> Lengths:
    length = TrainingConfig(**(training or {"train_samples": total}))
    return Lengths(BatchConfig(seq_length=SEQ), length, optimizer, global_batch_size)


def rate(step: int, **changes: Any) -> float:
    return rate_of(step, config(**changes))


def rate_of(step: int, optimizer: OptimizerConfig, total: int = 1000) -> float:
    return learning_rate(step, optimizer, lengths(optimizer, total))


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
    assert rate_of(60, short, 110) == pytest.approx(0.55)
    assert rate_of(110, short, 110) == MIN_LR


def test_the_warmup_fraction_is_a_share_of_the_decay() -> None:
    assert lengths(config(lr_warmup_iters=0, lr_warmup_fraction=0.2)).warmup == 22
    assert lengths(config(lr_warmup_iters=0, lr_warmup_fraction=0.2, lr_decay_iters=None)).warmup == 200
    fraction = {"lr_warmup_iters": 0, "lr_warmup_fraction": 0.015}
    assert lengths(config(**fraction)).warmup == 0.015 * 110, "not cut to whole samples"
    assert rate(1, **fraction) == pytest.approx(LR / 1.65)
    assert rate(2, **fraction, lr_decay_style="linear") == pytest.approx(0.1 + 0.9 * (1 - 0.35 / 108.35))
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
    rates = [rate_of(step, chosen, end) for step in range(1, end + 20)]
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
        assert rate_of(theirs.num_steps, ours) == pytest.approx(expected, rel=1e-12)


def test_the_inverse_square_root_is_min_lr_past_the_end_as_in_megatron() -> None:
    assert rate(END + 1, lr_decay_style="inverse-square-root") == MIN_LR


# A run of 24 steps of 8 samples of 8 tokens, said in each unit: all must have the same rates.
BATCH = 8
UNITS = {"iters": 1, "samples": BATCH, "tokens": BATCH * SEQ}


def rates_of(optimizer: OptimizerConfig, **training: Any) -> list[float]:
    all_lengths = lengths(optimizer, global_batch_size=BATCH, **training)
    positions = [all_lengths.position(step, step * BATCH) for step in range(1, 30)]
    return [learning_rate(position, optimizer, all_lengths) for position in positions]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("train", UNITS)
@pytest.mark.parametrize("phase", UNITS)
def test_lengths_in_steps_samples_and_tokens_give_the_same_rates(style: str, train: str, phase: str) -> None:
    base = {"lr": LR, "min_lr": MIN_LR, "lr_decay_style": style}
    in_steps = {"lr_decay": 20, "lr_warmup": 4} | ({"lr_wsd_decay": 6} if style == "WSD" else {})
    expected = rates_of(OptimizerConfig(**base, **{f"{k}_iters": n for k, n in in_steps.items()}), train_iters=24)
    spelled = {f"{name}_{phase}": steps * UNITS[phase] for name, steps in in_steps.items()}
    assert rates_of(OptimizerConfig(**base, **spelled), **{f"train_{train}": 24 * UNITS[train]}) == expected
    share = base | {f"{name}_{phase}": n * UNITS[phase] for name, n in in_steps.items() if name != "lr_warmup"}
    found = rates_of(OptimizerConfig(**share, lr_warmup_fraction=0.2), **{f"train_{train}": 24 * UNITS[train]})
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_run_in_samples_keeps_its_place_when_the_batch_size_changes_and_one_in_steps_too() -> None:
    optimizer = OptimizerConfig(lr=LR, lr_decay_style="linear")
    for size in (8, 32):
        in_samples = lengths(optimizer, global_batch_size=size, train_samples=96)
        assert learning_rate(in_samples.position(99, 24), optimizer, in_samples) == pytest.approx(0.75)
        in_steps = lengths(optimizer, global_batch_size=size, train_iters=12)
        assert learning_rate(in_steps.position(3, 12345), optimizer, in_steps) == pytest.approx(0.75)


def test_of_samples_and_tokens_the_shorter_length_counts() -> None:
    optimizer = OptimizerConfig(lr=LR)
    assert lengths(optimizer, train_samples=96, train_tokens=50 * SEQ).total.name == "train_tokens"
    assert lengths(optimizer, train_samples=96, train_tokens=100 * SEQ).total.samples == 96


def megatrons_weight_decay(num_steps: int, incr_steps: int, style: str, start: float, end: float) -> float:
    """Megatron-LM, OptimizerParamScheduler.get_wd, written out from its description."""
    if num_steps > incr_steps:
        return end
    ratio = num_steps / incr_steps
    return start + (end - start) * (ratio if style == "linear" else 0.5 * (math.cos(math.pi * (1 - ratio)) + 1.0))


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_the_weight_decay_grows_as_in_megatron(style: Any) -> None:
    ours = OptimizerConfig(lr=LR, start_weight_decay=0.02, end_weight_decay=0.3, weight_decay_incr_style=style)
    all_lengths = lengths(ours, train_samples=100)
    for sample in range(1, 120, 7):
        expected = megatrons_weight_decay(sample, 100, style, 0.02, 0.3)
        assert weight_decay(sample, ours, all_lengths) == pytest.approx(expected, rel=1e-12)


def test_embedding_and_head_have_a_rate_of_their_own() -> None:
    own = config(decoupled_lr=4.0, decoupled_min_lr=0.5, lr_decay_style="linear")
    found = step_settings(60, own, lengths(own))
    assert (found.lr, found.decoupled_lr) == (pytest.approx(0.55), pytest.approx(2.25))
    shared_end = config(decoupled_lr=4.0, lr_decay_style="linear")
    assert step_settings(END, shared_end, lengths(shared_end)).decoupled_lr == MIN_LR
    none = config()
    assert step_settings(60, none, lengths(none)).decoupled_lr == rate(60)
