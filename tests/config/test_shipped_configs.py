"""Shipped DeepSpeed JSONs and recipes merge; importing the configuration is light; the reference is complete."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megalm.config.deepspeed.write import engine_json
from megalm.config.merging.load import load_config
from megalm.config.merging.reference import reference_markdown
from megalm.config.merging.settings import SETTINGS

ROOT = Path(__file__).resolve().parents[2]
JSONS = sorted((ROOT / "ds_configs").glob("*.json"))
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
QUICK_START = [file for file in RECIPES if file.stem.startswith("quickstart")]
"""Those of published models say their own ZeRO stage: tests/planner/test_published_recipes.py."""
PRECISION = {"fp16.json": "--fp16"}


def test_the_json_files_are_shipped():
    assert [file.stem for file in JSONS] == ["fp16", "offload", "zero0", "zero1", "zero2", "zero3", "zero3_offload"]


@pytest.mark.parametrize("file", JSONS, ids=lambda file: file.stem)
def test_shipped_json_merges_with_small_flags(load, file):
    config = load("--global-batch-size 32", "" if file.name in PRECISION else "--bf16", f"--deepspeed_config {file}")
    merged = engine_json(config, 2)
    assert merged["train_batch_size"] == 32
    assert merged["zero_optimization"]["stage"] == json.loads(file.read_text())["zero_optimization"]["stage"]
    assert "auto" not in json.dumps(merged)


@pytest.mark.parametrize("file", JSONS, ids=lambda file: file.stem)
def test_deepspeed_accepts_shipped_json(load, file):
    deepspeed_config = pytest.importorskip("deepspeed.runtime.config")
    deepspeed_config.DeepSpeedConfig(engine_json(load(f"--deepspeed_config {file}"), 1))


@pytest.mark.parametrize("file", JSONS, ids=lambda file: file.stem)
def test_shipped_json_is_short(file):
    assert 15 <= len(file.read_text().splitlines()) <= 35


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_shipped_recipe_loads_from_the_repository_root(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(["--config", str(recipe)])
    assert engine_json(config, 1)["train_batch_size"] == config.batch.global_batch_size


@pytest.mark.parametrize("recipe", QUICK_START, ids=lambda file: file.stem)
@pytest.mark.parametrize("file", JSONS, ids=lambda file: file.stem)
def test_every_json_merges_with_every_quickstart(recipe, file, monkeypatch):
    monkeypatch.chdir(ROOT)
    other = ["--no-bf16"] if file.name in PRECISION else []
    config = load_config(["--config", str(recipe), "--deepspeed_config", str(file), "--zero-stage", "none", *other])
    assert "auto" not in json.dumps(engine_json(config, 1))


def test_importing_the_configuration_needs_neither_torch_nor_the_environment():
    program = (
        "import sys, megalm.config.merging.load; print(*sorted({'torch', 'deepspeed', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


def test_configuration_files_do_not_read_the_environment():
    files = list((ROOT / "megalm" / "config").glob("*.py"))
    assert files
    assert [file.name for file in files if "import os" in file.read_text()] == ["paths.py"]


def test_reference_has_every_setting_with_its_help():
    text = reference_markdown()
    for setting in SETTINGS.values():
        assert f"`{setting.flag}`" in text
        assert setting.help.replace("<", "&lt;").replace("|", "\\|") in text
    assert text.endswith("|\n")
