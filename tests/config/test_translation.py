"""Public configurations of other trainers become recipes that the parser accepts; nothing is lost in silence."""

import contextlib
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.cli import main
from megalm.commands.translate import translate
from megalm.config.merging.load import load_config
from megalm.config.rules.layout import check_layout
from megalm.config.translation.shell import training_command
from megalm.config.translation.table import Translation
from megalm.errors import ConfigError

PEERS = Path(__file__).with_name("peers")


@cache
def translated(*names: str) -> Translation:
    return translate([PEERS / name for name in names])


def fates(found: Translation) -> dict[str, list[str]]:
    rows: dict[str, list[str]] = {}
    for row in found.rows:
        rows.setdefault(row.fate, []).append(row.theirs)
    return rows


PUBLIC: dict[tuple[str, ...], tuple[dict[str, Any], list[str]]] = {
    ("megatron_gpt3_175b.sh",): (
        {"num_layers": 96, "tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 16, "fp16": True,
         "lr_warmup_fraction": 0.001, "hidden_dropout": 0.1, "data_path": ("DATA_PATH",), "split": "949,50,1"},
        ["step_batch_size_schedule"],
    ),
    ("megatron_llama3_8b.sh",): (
        {"train_samples": 1953125000, "lr_decay_samples": 1949218748, "lr_warmup_samples": 3906252, "swiglu": True,
         "decoupled_lr": 5e-4, "decoupled_min_lr": 4.5e-5, "grad_accum_dtype": "model", "mock_data": True,
         "split": "99,1,0", "rotary_base": 1e6, "attention_dropout": 0.0, "save": "checkpoints/llama3_8b_fp8",
         "apply_layernorm_1p": True},
        ["--empty-unused-memory-level", "--overlap-grad-reduce", "--overlap-param-gather", "--fp8-", "--fp8-", "--fp8-",
         "--fp8-", "--no-mmap-bin-files", "--profile", "--profile-", "--profile-", "--ckpt-format",
         "sequence_parallel"],
    ),
    ("megatron_mixtral_8x7b.sh",): (
        {"position_embedding_type": "rope", "num_query_groups": 8, "tokenizer_model": "TOKENIZER_MODEL"},
        ["--num-experts", "--moe-", "--moe-", "--moe-", "--moe-", "--moe-", "--overlap-", "--overlap-", "--expert-",
         "sequence_parallel"],
    ),
    ("megatron_deepspeed_llama2.sh",): (
        {"num_query_groups": 4, "position_embedding_type": "rope", "normalization": "RMSNorm", "zero_stage": 0,
         "data_path": ("1", "./tmp/data/bookcorpus_train_1m_text_sentence"), "ffn_hidden_size": 5504},
        [],
    ),
    ("megatron_deepspeed_gpt_1.3b.sh",): (
        {"train_tokens": 300_000_000_000, "train_samples": 439453125, "lr_decay_tokens": 260_000_000_000,
         "lr_warmup_tokens": 375_000_000, "rampup_batch_size": (32, 32, 1953125), "global_batch_size": 512,
         "recompute_granularity": "full", "attention_dropout": 0.1, "tokenizer_type": "GPT2BPETokenizer"},
        [],
    ),
    ("neox_125M.yml", "neox_local_setup.yml"): (
        {"lr": 6e-4, "adam_beta2": 0.95, "min_lr": 6e-5, "lr_warmup_fraction": 0.01, "weight_decay": 0.1, "fp16": True,
         "init_method_std": (2 / (5 * 768)) ** 0.5, "initial_loss_scale": 2.0**32, "position_embedding_type": "rope",
         "untie_embeddings_and_output_weights": True, "save": "checkpoints", "save_interval": 10000,
         "data_path": ("data/enwik8/enwik8_text_document",), "recompute_granularity": "full", "zero_stage": 1},
        ["output_layer_init_method: wang_init", "partition_activations", "synchronize_each_layer"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("names", PUBLIC, ids=" ".join)
def test_public_configurations_become_recipes_that_the_parser_accepts(names: tuple[str, ...], tmp_path: Path) -> None:
    expected, refused = PUBLIC[names]
    found = translated(*names)
    assert {name: found.given.get(name) for name in expected} == expected
    rows = fates(found).get("REFUSED", [])
    assert len(rows) == len(refused)
    assert all(row.startswith(start) for row, start in zip(rows, refused, strict=True)), rows
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(found.recipe())
    config = load_config(["--config", str(recipe)])
    for name, value in expected.items():
        assert name not in found.given or value in [getattr(section, name, None) for _, section in config]
    one_copy = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    assert check_layout(config, one_copy) == 1


def test_every_flag_of_a_script_has_a_row() -> None:
    for name in (name for names in PUBLIC for name in names if name.endswith(".sh")):
        words, _ = training_command((PEERS / name).read_text())
        rows = " ".join(row.theirs for row in translated(name).rows).replace("=", " ")
        missing = [word for word in words if word.startswith("--") and word.partition("=")[0] not in rows]
        assert missing == [], name


SCRIPTS = {
    "N=3; python pretrain_gpt.py --num-layers $N  # the depth": "python pretrain_gpt.py --num-layers 3",
    'A="--lr 1e-3 \\\n  --bf16"\ntorchrun x/pretrain_gpt.py $A': "torchrun x/pretrain_gpt.py --lr 1e-3 --bf16",
    'A=(--a 1 "b c")\nA+=(--d)\npretrain_gpt.py "${A[@]}"': "pretrain_gpt.py --a 1 'b c' --d",
    'A=(--a "1 2")\npretrain_gpt.py ${A[@]}': "pretrain_gpt.py --a 1 2",
    "pretrain_gpt.py --x ${Y:-7} ${Z-8} ${A:+9} $@ --d $1": "pretrain_gpt.py --x 7 8 --d UNKNOWN_1",
    "D=$1\nT=$D/t\npretrain_gpt.py --data-path $D --t ${T}": "pretrain_gpt.py --data-path D --t D/t",
    "D=<Specify path>/x\npretrain_gpt.py --data-path $D": "pretrain_gpt.py --data-path D/x",
    "S=$((2 * (3+4) / 2 - 1))\npretrain_gpt.py --seq $S": "pretrain_gpt.py --seq 6",
    "N=8\nW=$(($N*2))\npretrain_gpt.py --w ${W}0": "pretrain_gpt.py --w 160",
    'if [ "$M" = x ] || [[ 3 -gt 2 ]]; then F=--a; else F=--b; fi\npretrain_gpt.py $F': "pretrain_gpt.py --a",
    "if [ 1 -eq 2 ]; then F=1\nelif [[ -z $Q ]]; then F=2; else F=3; fi\npretrain_gpt.py --f $F":
        "pretrain_gpt.py --f 2",
    "if ! false_command; then F=1; fi\npretrain_gpt.py --f $F": "pretrain_gpt.py --f F",
    'C="deepspeed ../pretrain_gpt.py --a \'b\' &> log"\neval $C': "deepspeed ../pretrain_gpt.py --a b",
    "cat <<EOT > pretrain_gpt.py\npretrain_gpt.py --no\nEOT\nsrun pretrain_gpt.py --yes": "srun pretrain_gpt.py --yes",
    "f() { pretrain_gpt.py --no; }\nfor i in 1 2; do pretrain_gpt.py --no; done\npretrain_gpt.py --yes 2>&1 | tee log":
        "pretrain_gpt.py --yes",
    "R=\"python -u x/pretrain_gpt.py --a\"\nsrun -l --output=x sh -c \"${R}\"": "python -u x/pretrain_gpt.py --a",
    "export A=1 B=2\nC=3 pretrain_gpt.py --a $A --b $B": "pretrain_gpt.py --a 1 --b 2",
    "python -m megatron.pretrain_gpt --a 1 > log": "python -m megatron.pretrain_gpt --a 1",
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_shell_is_read_as_bash_would(script: str) -> None:
    assert training_command(script)[0] == shlex.split(SCRIPTS[script])


@pytest.mark.parametrize("evil", ['A="$A$A"\n' * 60, "A=((" * 400, '"$(x)' * 4000, "$((9*" * 500, "eval eval " * 300])
def test_no_script_hangs_or_is_run(evil: str, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    with pytest.raises(ConfigError):
        training_command(f"A=1\n{evil}\n$(touch {ran}); `touch {ran}`; eval touch {ran}")
    assert not ran.exists()


@given(st.text(alphabet="ab$(){}[]\"'`\\ \n;&|<>#=+-@*1", max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigError):
        training_command(text + "\npretrain_gpt.py --a")


def test_the_command_prints_a_table_and_writes_the_recipe_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = str(PEERS / "megatron_deepspeed_llama2.sh")
    assert main(["translate", source]) == 0
    printed = capsys.readouterr().out
    assert "--num-key-value-heads 4" in printed
    assert "39 same" in printed
    assert Path("megatron_deepspeed_llama2.megalm.yaml").read_text().startswith("# Translated by")
    assert main(["translate", source]) == 2
    assert "exists; give another --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{a: [}", "not YAML"),
        ("- a", "a configuration of GPT-NeoX is a mapping of settings"),
        ("num_layers: 3", "hidden_size is missing"),
        ("python train.py --lr 1 # pretrain_x", "no command that starts a pretrain_*.py script was found"),
    ],
)
def test_what_is_no_configuration_is_an_error(
    text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert main(["translate", str(tmp_path / "a.txt")]) == 2
    assert expected in capsys.readouterr().err


def test_every_command_of_the_page_is_accepted() -> None:
    page = Path(__file__).parents[2] / "docs/coming_from.md"
    blocks = re.findall(r"^```text\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        words = shlex.split(block)
        assert words[:2] == ["deepspeed", "launch/pretrain_gpt.py"]
        config = load_config(words[2:])
        parallel = config.parallel
        assert check_layout(config, parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size) == 1
