"""A dumped run loads back equal; the hash changes with what training depends on and with nothing else."""

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalm.config.merging.dump import dump_config
from megalm.config.merging.load import load_config
from megalm.config.sections import RunConfig
from megalm.errors import ConfigError

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
WORDS = st.sampled_from(["1e5", "yes", "null", "1:30", "~", "0x10", "a: b", "# c", "- d", "2020-01-01", "é\u2028\n x"])
PATH = st.one_of(TEXT, WORDS).filter(lambda text: text.strip() and not re.match(r"~.|.*[$\0]", text, re.DOTALL))
SMALL = st.floats(1e-12, 0.5)


@st.composite
def runs(draw: st.DrawFn) -> RunConfig:
    """Checked runs with awkward numbers and texts."""
    given_sections: dict[str, Any] = {
        "model": {
            "num_layers": draw(st.integers(1, 200)),
            "hidden_size": 64,
            "num_attention_heads": draw(st.sampled_from([1, 2, 4, 8])),
            "norm_epsilon": draw(SMALL),
            "swiglu": draw(st.booleans()),
            "normalization": draw(st.sampled_from(["LayerNorm", "RMSNorm"])),
        },
        "batch": {"seq_length": 8, "micro_batch_size": 2, "global_batch_size": draw(st.none() | st.integers(1, 99))},
        "training": {
            "train_iters": draw(st.integers(1, 10**9)),
            "seed": draw(st.integers(0, 2**32 - 1)),
            "exit_duration_in_mins": draw(SMALL),
        },
        "optimizer": {"lr": draw(st.floats(0.5, 1e10)), "min_lr": draw(SMALL)},
        "precision": {"bf16": draw(st.booleans())},
        "data": {"data_path": draw(PATH), "split": "1, .5"},
        "checkpoint": {"save": draw(PATH), "load": draw(st.none() | PATH)},
        "engine": {
            "zero_stage": draw(st.integers(1, 3)),
            "deepspeed_config": draw(
                st.none()
                | st.fixed_dictionaries(
                    {"zero_optimization": st.fixed_dictionaries({"reduce_bucket_size": st.just(5e7)})}
                )
            ),
        },
    }
    return RunConfig.model_validate({name: given_sections.get(name, {}) for name in RunConfig.model_fields})


def load_text(text: str) -> RunConfig:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(text, encoding="utf-8", newline="")
        return load_config(["--config", str(file)])


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(runs())
def test_a_dumped_run_loads_back_equal(config):
    assert load_text(dump_config(config)) == config


def test_print_config_prints_a_recipe_with_sources_and_the_deepspeed_json(load, write, capsys):
    write("ds.json", '{"zero_optimization": {"stage": 2, "reduce_bucket_size": 7}}')
    with pytest.raises(SystemExit) as caught:
        load("--deepspeed_config ds.json --print-config")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "  num_layers: 2  # --num-layers\n" in printed
    assert "  zero_stage: 2  # ds.json:1\n" in printed
    assert '#   "train_batch_size": "auto"' in printed
    assert '#     "reduce_bucket_size": 7' in printed
    assert load_text(printed) == load("--deepspeed_config ds.json")


def test_print_config_of_a_wrong_run_is_an_error(load):
    with pytest.raises(ConfigError):
        load("--hidden-size 0 --print-config")
