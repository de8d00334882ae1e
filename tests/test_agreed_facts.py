"""Everything that must be the same on all ranks is among the facts that they compare; what may differ is named."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalm.agreed_facts import agreed_facts
from megalm.checkpoint.fresh import command_of, note_fresh, note_stopped, without_done_commands
from megalm.config.base import MayDiffer, OneShot
from megalm.config.merging.dump import dump_config
from megalm.config.merging.load import load_config
from megalm.config.merging.settings import SECTIONS, SETTINGS, Setting
from megalm.config.sections import RunConfig
from megalm.data.indexed.writer import IndexedDatasetBuilder
from megalm.errors import ConfigError

FLAGS = "--num-layers 2 --hidden-size 8 --num-attention-heads 2 --seq-length 8 --micro-batch-size 1 --lr 1 "
FLAGS += "--vocab-size 300 --train-iters 1"


def facts(config: RunConfig, world_size: int = 2) -> dict[str, Any]:
    return dict(agreed_facts(config, {}, world_size, "cpu").values)


def run_of(*flags: str) -> RunConfig:
    return load_config([*FLAGS.split(), *flags])


def another(setting: Setting, value: Any) -> Any:
    """A value that is not `value`."""
    if setting.is_bool:
        return not value
    if setting.is_list:
        return ("another",)
    if isinstance(value, int | float):
        return value + 1
    return 1 if int in setting.types or float in setting.types else "another"


MAY_DIFFER = {"data_cache_path", "tensorboard_dir", "local_rank"}


def test_every_setting_is_compared_but_those_of_the_node_itself() -> None:
    config = run_of("--mock-data")
    before = facts(config)
    for name, setting in SETTINGS.items():
        section = getattr(config, setting.section)
        changed = section.model_copy(update={name: another(setting, getattr(section, name))})
        values = config.model_copy(update={setting.section: changed}).agreed()
        now = {key: value for fields in values.values() for key, value in fields.items()}
        differs = [key for key in now if now[key] != before[key]]
        assert differs == ([] if name in MAY_DIFFER else [name])
    assert {name for cls in SECTIONS.values() for name in cls.marked(MayDiffer)} == MAY_DIFFER


def test_ranks_devices_and_variables_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_of("--mock-data")
    before = facts(config)
    versions = {f"the version of {name}" for name in ("python", "torch", "deepspeed", "megalm")}
    assert {"the kernels' sources", *versions} <= set(before)
    assert facts(config, world_size=4) != before
    for name in ("NCCL_ALGO", "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "1")
        assert facts(config) != before
        monkeypatch.delenv(name)
    for name in ("GLOO_SOCKET_IFNAME", "HOSTNAME", "LOCAL_RANK"):  # each node's own
        monkeypatch.setenv(name, "1")
    assert facts(config) == before


def test_inputs_are_compared_by_what_is_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(first: int) -> None:
        with IndexedDatasetBuilder(tmp_path / "data", "uint16", overwrite=True) as builder:
            builder.add_documents(np.arange(first, first + 80), np.full(10, 8, dtype=np.int32))
            builder.finalize()
        (tmp_path / "words.model").write_text(f"{first}")
        (tmp_path / "mine.py").write_text(f"FIRST = {first}")

    monkeypatch.syspath_prepend(tmp_path)
    config = run_of(
        "--train-data-path", str(tmp_path / "data"), "--tokenizer-model", str(tmp_path / "words.model"),
        "--import-module", "mine",
    )  # fmt: skip
    write(0)
    before = facts(config)
    for path in tmp_path.iterdir():
        os.utime(path, (time.time() + 100, time.time() + 100))
    assert facts(config) == before  # a copy is as good
    write(1)
    changed = {name for name, value in facts(config).items() if value != before[name]}
    assert changed == {
        f"the data of {tmp_path / 'data'}", f"the tokenizer {tmp_path / 'words.model'}", "the code of mine"
    }  # fmt: skip
    (tmp_path / "data.idx").unlink()
    assert str(facts(config)[f"the data of {tmp_path / 'data'}"]).startswith("none: no file")


def test_the_checkpoint_that_a_rank_sees_is_compared(tmp_path: Path) -> None:
    def checkpoint(step: int, text: str) -> None:
        (tmp_path / f"step_{step}").mkdir(exist_ok=True)
        (tmp_path / f"step_{step}" / "manifest.json").write_text(text)
        (tmp_path / "latest").write_text(f"step_{step}\n")

    config, seen = run_of("--mock-data", "--save", str(tmp_path)), []
    seen.append(facts(config)["the checkpoint to start from"])
    for step, text in ((2, "a"), (4, "a"), (4, "b")):
        checkpoint(step, text)
        seen.append(facts(config)["the checkpoint to start from"])
    (tmp_path / "latest").write_text("step_9\n")
    seen.append(facts(config)["the checkpoint to start from"])
    assert len(set(seen)) == len(seen)
    assert (seen[0], seen[1][:6]) == ("none", "step_2")


ONE_SHOT = {"fresh", "skip_train", "allow_changed_data", "local_rank"}


def test_commands_to_one_start_are_not_kept(tmp_path: Path) -> None:
    assert {name for cls in SECTIONS.values() for name in cls.marked(OneShot)} == ONE_SHOT
    flags = ("--fresh", "--skip-train", "--allow-changed-data", "--local-rank", "1", "--save", str(tmp_path / "run"))
    config, plain = run_of("--mock-data", *flags), run_of("--mock-data", "--save", str(tmp_path / "run"))
    assert config != plain
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == plain
    assert config.kept() == plain.kept()


def test_the_same_command_with_fresh_goes_on_with_the_run_that_it_began_and_stopped(tmp_path: Path) -> None:
    def is_fresh(config: RunConfig, restart: int = 0) -> bool:
        return without_done_commands(config, restart)[0].checkpoint.fresh

    config = run_of("--mock-data", "--save", str(tmp_path), "--fresh")
    other = run_of("--mock-data", "--save", str(tmp_path), "--fresh", "--seed", "5")
    assert is_fresh(config)
    assert is_fresh(config, restart=1)
    note_fresh(tmp_path, command_of(config))
    assert is_fresh(config)  # it failed, or is complete
    assert not is_fresh(config, restart=1)  # the launcher started the job again
    note_stopped(tmp_path, True)
    assert not is_fresh(config)
    assert "goes on" in without_done_commands(config, 0)[1][0]
    assert is_fresh(other)
    assert is_fresh(other, restart=1)
    note_stopped(tmp_path, False)
    assert is_fresh(config)
    for text in ("[]", "{", "7", '{"command": 1}'):
        (tmp_path / "fresh.json").write_text(text)
        note_stopped(tmp_path, True)
        assert is_fresh(config)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--sequence-parallel", "sequence_parallel=true needs tensor_model_parallel_size > 1"),
        ("--tensor-model-parallel-size 3", "tensor_model_parallel_size=3 must divide num_attention_heads=2"),
        ("--pipeline-model-parallel-size 3", "3"),
        ("--global-batch-size 3 --micro-batch-size 2", "global_batch_size=3"),
        ("--tensor-model-parallel-size 2 --global-batch-size 8 --gradient-accumulation-steps 2", None),
    ],
)
def test_print_config_runs_the_layouts_checks_too(flags: str, says: str | None) -> None:
    with pytest.raises((ConfigError, SystemExit)) as ended:
        run_of("--mock-data", "--print-config", *flags.split())
    assert says in str(ended.value) if says else isinstance(ended.value, SystemExit)
