"""Lines for people, and for the scripts that parse Megatron-LM's log."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.monitor.sinks.base import Cadence
from megalm.monitor.sinks.terminal import TerminalSink, progress_line, validation_line
from megalm.monitor.tables import count, duration, summary

ROW = {
    "step": 20,
    "consumed_samples": 320,
    "iteration_time_s": 0.1234,
    "learning_rate": 3e-4,
    "global_batch_size": 16,
    "loss": 5.25,
    "loss_scale": 65536.0,
    "grad_norm": 1.5,
    "skipped_iterations": 1,
    "nan_iterations": 2,
    "tokens_per_s": 12345.6,
}


def test_a_progress_line_has_megatrons_fields_in_megatrons_order() -> None:
    line = progress_line(ROW, 500, remaining_s=3723)
    assert line == (
        " iteration       20/     500 | consumed samples:          320 | elapsed time per iteration (ms): 123.4 | "
        "learning rate: 3.000000E-04 | global batch size:    16 | lm loss: 5.250000E+00 | loss scale: 65536.0 | "
        "grad norm: 1.500 | number of skipped iterations:   1 | number of nan iterations:   2 | tokens/s: 12,346 | "
        "ETA: 1:02:03 |"
    )


def test_a_progress_line_can_be_parsed_even_when_the_loss_is_not_a_number() -> None:
    line = progress_line(ROW | {"loss": math.nan, "grad_norm": math.inf}, 500, remaining_s=0)
    fields = dict(re.findall(r"([a-z ()]+): +(\S+) \|", line))
    assert math.isnan(float(fields[" lm loss"]))
    assert float(fields[" grad norm"]) == math.inf


def test_an_evaluation_line_names_its_set() -> None:
    expected = " test loss at iteration 30 | lm loss value: 4.000000E+00 | lm loss PPL: 5.459800E+01 |"
    assert validation_line(30, 4.0, 54.598, "test") == expected
    assert validation_line(30, 4.0, 54.598).startswith(" validation loss at iteration 30 |")


def test_each_loss_of_an_evaluation_is_shown_and_the_perplexity_is_that_of_tokens(caplog) -> None:
    caplog.set_level("INFO", logger="megalm")
    sink = TerminalSink(10, Cadence(1, at_ends=True))
    sink.row(3, {"validation_loss/web": 3.5, "validation_lm_loss/web": 3.0, "validation_sentence_loss/web": 0.5,
                 "validation_ppl/web": 20.0855})  # fmt: skip
    sink.row(3, {"test_loss": 21.0, "test_generator_loss": 1.0, "test_discriminator_loss": 0.4})
    assert caplog.messages == [
        " validation web loss at iteration 3 | total loss value: 3.500000E+00 | lm loss value: 3.000000E+00 | "
        "lm loss PPL: 2.008550E+01 | sentence loss value: 5.000000E-01 |",
        " test loss at iteration 3 | total loss value: 2.100000E+01 | generator loss value: 1.000000E+00 | "
        "discriminator loss value: 4.000000E-01 |",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3599, "0:59:59"), (90061, "25:01:01"), (-3, "0:00:00")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@given(st.floats(0, 1e7))
def test_a_duration_says_the_seconds_to_half_a_second(seconds: float) -> None:
    hours, minutes, rest = map(int, duration(seconds).split(":"))
    assert minutes < 60
    assert rest < 60
    assert abs(hours * 3600 + minutes * 60 + rest - seconds) <= 0.5


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (12_600_000, "12.6M"),
        (1.3e9, "1.3B"),
        (2e12, "2T"),
        (1500, "1.5k"),
        (999, "999"),
        (0, "0"),
        (1.12e16, "11.2P"),
        (999_600, "1M"),
        (3.2e18, "3.2E"),
        (1.5e21, "1,500E"),
        (0.25, "0.25"),
        (1 / 3, "0.333"),
    ],
)
def test_counts(number: float, text: str) -> None:
    assert count(number) == text


def test_a_summary_is_aligned() -> None:
    assert summary("run", [("a", "one"), ("long", "two")]) == "run\n  a     one\n  long  two"
