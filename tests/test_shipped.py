"""Where shipped files are, and what is said to those who look for them elsewhere."""

from pathlib import Path

import pytest

from megalm import cli
from megalm.config.merging.load import load_config
from megalm.errors import ConfigError
from megalm.launching.site import read_site
from megalm.shipped import FOLDERS, shipped_folder, shipped_hint

ROOT = Path(__file__).parents[1]


def test_a_checkout_uses_its_own_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert shipped_folder() == ROOT
    assert all((ROOT / name).is_dir() for name in FOLDERS)
    assert cli.main(["shipped"]) == 0
    assert capsys.readouterr().out == f"{ROOT}\n"


@pytest.mark.parametrize("path", ["", "no/such.yaml", "ds_configs/zero7.json", "README.md", "/ds_configs/zero1.json"])
def test_other_paths_get_no_hint(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped_hint(path) == ""


def test_a_file_that_is_there_gets_no_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert shipped_hint("ds_configs/zero1.json") == ""


def test_messages_say_where_the_shipped_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for flag, path in (("--config", "launch/recipes/quickstart.yaml"), ("--deepspeed_config", "ds_configs/zero1.json")):
        with pytest.raises(ConfigError, match=f"{path} cannot be read: .*; give {ROOT / path}, which comes"):
            load_config([flag, path])
    site = "launch/slurm/site.yaml"
    with pytest.raises(ConfigError, match=f"correct the path; give {ROOT / site}, which comes with megalm"):
        read_site(site, {})
