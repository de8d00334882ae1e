"""Paths: `~` and variables mean the same in flags, recipes, sites and commands; nothing is no path; whose they are."""

import argparse
import importlib
from pathlib import Path

import pytest

from megalm import cli
from megalm.config.merging.load import load
from megalm.config.merging.settings import SETTINGS
from megalm.config.output import load_argument
from megalm.config.paths import path_argument, read_path
from megalm.data.tokenizers.arguments import add_tokenizer_arguments, tokenizer_config
from megalm.errors import ConfigError
from megalm.shipped import shipped_folder

PLAIN = [
    "--num-layers=2", "--hidden-size=64", "--num-attention-heads=4", "--seq-length=64", "--micro-batch-size=4",
    "--train-iters=2", "--lr=1", "--vocab-size=256", "--eval-iters=0",
]  # fmt: skip
OUTPUTS = ("save", "tensorboard_dir", "data_cache_path")
INPUTS = [name for name, setting in SETTINGS.items() if setting.input_path is not None]


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home folder, with the current folder elsewhere."""
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.delenv("NOT_SET", raising=False)
    monkeypatch.chdir(here)
    return home


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~", "HOME"), ("~/run", "HOME/run"), ("$HOME/run", "HOME/run"), ("${SCRATCH}/run", "/scratch/run"),
        ("a/$SCRATCH", "a//scratch"), ("~root", "/root"), ("./~", "./~"), ("a~b", "a~b"), ("a $(x) 'q'", "a $(x) 'q'"),
        ("100$", "100$"), ("-", "-"), ("a/*.jsonl", "a/*.jsonl"),
    ],
)  # fmt: skip
def test_a_path_is_read_as_a_shell_would(text: str, path: str, home: Path) -> None:
    assert read_path(text) == path.replace("HOME", str(home))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", 'must be a path, not ""'), ("  ", 'must be a path, not "  "'), ("a\0b", "must be a path"),
        ("$NOT_SET/x", "names $NOT_SET, which is not set here; set it, or write the path out"),
        ("a/${HOME:-x}/b", "holds ${HOME:-x}; variables are $NAME or ${NAME} here"), ("${HOME/x", "holds ${HOME/x"),
        ("${NOT_SET}", "names $NOT_SET"), ("~no-such-user/x", "begins with ~no-such-user, and no user has that name"),
    ],
)  # fmt: skip
def test_what_is_no_path_is_refused_with_the_rule(text: str, rule: str) -> None:
    with pytest.raises(ValueError, match=r"must|names|begins|holds") as raised:
        read_path(text)
    assert rule in str(raised.value)


@pytest.mark.parametrize("name", [*OUTPUTS, *INPUTS])
@pytest.mark.parametrize("by", ["flag", "recipe"])
def test_every_path_of_a_run_is_one_by_flag_and_by_recipe(name: str, by: str, home: Path) -> None:
    def given(value: str) -> list[str]:
        data = [] if name.endswith("data_path") else ["--mock-data"]
        data += ["--train-data-path", "t"] if name in ("valid_data_path", "test_data_path") else []
        if by == "flag":
            return [*PLAIN, *data, f"{SETTINGS[name].flag}={value}"]
        Path("recipe.yaml").write_text(f"{SETTINGS[name].section}:\n  {name}: '{value}'\n")
        return [*PLAIN, *data, "--config", "recipe.yaml"]

    (home / "x").write_text("{}")
    if name != "deepspeed_config":  # read at once
        loaded = load(given("~/x")).config.model_dump()[SETTINGS[name].section][name]
        assert loaded in (f"{home}/x", (f"{home}/x",))
    else:
        load(given("~/x"))
    for value, error in (("", 'must be a path, not ""'), ("$NOT_SET/x", "names $NOT_SET")):
        with pytest.raises(ConfigError) as raised:
            load(given(value))
        source = SETTINGS[name].flag if by == "flag" else "recipe.yaml:2"
        assert str(raised.value).startswith(f"{name}={value} ({source}) {error}")


def test_recipes_are_paths_too(home: Path) -> None:
    (home / "r.yaml").write_text("checkpoint: {save: ~/run}\n")
    assert load([*PLAIN, "--mock-data", "--config=~/r.yaml"]).config.checkpoint.save == f"{home}/run"
    for value, error in (("", "--config  must be a path"), ("$NOT_SET", "--config $NOT_SET names $NOT_SET")):
        with pytest.raises(ConfigError, match="--config") as raised:
            load([*PLAIN, "--mock-data", f"--config={value}"])
        assert error in str(raised.value)


def test_a_relative_path_of_a_recipe_is_the_one_here_else_the_one_beside_it_and_that_is_said(home: Path) -> None:
    recipe = home / "r.yaml"
    recipe.write_text(
        "tokenizer: {tokenizer_model: t.model}\ndata:\n  data_path: [0.5, sets/a, 0.5, sets/b]\n"
        "checkpoint: {save: run}\nengine: {deepspeed_config: ds_configs/zero2.json}\n"
    )
    (home / "sets").mkdir()
    for name in ("t.model", "sets/a.idx"):
        (home / name).touch()
    loaded = load([*PLAIN, "--config", str(recipe)])
    assert loaded.config.tokenizer.tokenizer_model == f"{home}/t.model"
    assert loaded.config.data.data_path == ("0.5", f"{home}/sets/a", "0.5", "sets/b")
    assert loaded.config.checkpoint.save == "run", "what is written is where the user stands"
    assert loaded.config.engine.zero_stage == 2, "what comes with megalm is found without a copy"
    assert loaded.notes == [
        f"tokenizer_model: t.model ({recipe}:1) is not in {Path.cwd()}; {home}/t.model is taken",
        f"data_path: sets/a ({recipe}:3) is not in {Path.cwd()}; {home}/sets/a is taken",
        f"data_path: sets/b ({recipe}:3) is neither in {Path.cwd()} nor beside the recipe",
        f"deepspeed_config: ds_configs/zero2.json ({recipe}:5) is not in {Path.cwd()}; "
        f"{shipped_folder()}/ds_configs/zero2.json is taken",
    ]
    Path("t.model").touch()
    assert load([*PLAIN, "--config", str(recipe)]).config.tokenizer.tokenizer_model == "t.model"


PATH_WORDS = {"FILE", "DIR", "FOLDER", "PREFIX", "RUN", "F", "P", "F.jsonl", "PATH", "RECIPE"}
"""What a command's --help shows for a value that is a path."""


@pytest.mark.parametrize("command", list(cli._COMMANDS))
def test_every_path_of_every_command_is_read_as_one(command: str) -> None:
    module = importlib.import_module(cli._COMMANDS[command][0])
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    for action in parser._actions:
        if action.metavar in PATH_WORDS:
            assert action.type in (path_argument, load_argument), (
                f"megalm {command} {action.option_strings or action.dest}"
            )


def test_a_command_refuses_what_is_no_path(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["inspect", "$NOT_SET/x"])
    assert left.value.code == 2
    assert "argument PREFIX: names $NOT_SET, which is not set here" in capsys.readouterr().err


def test_the_tokenizer_flags_of_commands_are_paths(home: Path) -> None:
    parser = argparse.ArgumentParser()
    add_tokenizer_arguments(parser)
    problems: list[str] = []
    assert tokenizer_config(parser.parse_args(["--tokenizer-model=~/t"]), problems).tokenizer_model == f"{home}/t"
    tokenizer_config(parser.parse_args(["--vocab-file", ""]), problems)
    assert problems == ['--vocab-file  must be a path, not ""; leave it out for its default']
