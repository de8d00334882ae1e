"""A run with a teacher: trained, stopped, gone on; another teacher; teachers that cannot teach it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from whole_runs import trained

from megalm.checkpoint.format import Manifest
from megalm.config.merging.load import load_config
from megalm.config.sections import RunConfig
from megalm.distillation import TeacherFolder, find_teacher
from megalm.errors import MegalmError
from megalm.testing.small_runs import metrics
from megalm.testing.spawner import run_on_ranks

RUN = (
    "--hidden-size 16 --num-attention-heads 2 --seq-length 16 --vocab-size 61 --make-vocab-size-divisible-by 8 "
    "--micro-batch-size 1 --global-batch-size 4 --lr 0.02 --mock-data --eval-iters 1 --log-interval 1 "
    "--init-method-std 0.2 --split 90,10,0 --num-workers 0 "
)
TEACHER = RUN + "--num-layers 3 --num-attention-heads 4 --train-iters 2 --sinks jsonl "
STUDENT = RUN + (
    "--num-layers 1 --hidden-dropout 0.1 --train-iters 4 --teacher-load {0}/teacher --logit-kl-temperature 2 "
    "--logit-kl-topk 12 --tensor-model-parallel-size 2 --sequence-parallel --sinks jsonl "
)


def story(folder: str) -> list[str]:
    """What ended each of the runs."""
    student = STUDENT.format(folder)
    return [
        trained(f"{TEACHER} --save {folder}/teacher"),
        trained(f"{student} --save {folder}/whole"),
        trained(f"{student} --save {folder}/stopped --exit-interval 2"),
        trained(f"{student} --save {folder}/stopped"),
        trained(f"{TEACHER} --save {folder}/teacher --train-iters 3"),  # and now it is another
        trained(f"{student} --save {folder}/stopped --train-iters 5"),
    ]


@pytest.mark.long  # training with a teacher: a command of docs/objectives.md; its parts: models/test_distillation.py
def test_a_run_goes_on_bit_for_bit_and_with_no_other_teacher(tmp_path: Path) -> None:
    *fine, refused = run_on_ranks(2, story, str(tmp_path))[0]
    assert fine == [""] * 5
    assert "the teacher is not the one that the run began with" in refused
    whole, stopped = ([row for row in metrics(tmp_path / name) if "loss" in row] for name in ("whole", "stopped"))
    for key in ("loss", "lm_loss", "kd_loss", "grad_norm"):
        assert [row[key] for row in stopped] == [row[key] for row in whole], key
    assert all(row["loss"] == pytest.approx(row["lm_loss"] + row["kd_loss"]) for row in whole)
    (evaluated,) = (row for row in metrics(tmp_path / "whole") if "validation_loss" in row)
    assert evaluated["validation_kd_loss"] > 0
    manifest = Manifest.read(tmp_path / "whole" / "step_4")
    assert manifest.identity["teacher"]
    assert not [name for name in manifest.tensors if "layers.2" in name], "the teacher is not in it"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers of several kinds, as model folders of transformers."""
    root = tmp_path_factory.mktemp("teachers")
    sizes: dict[str, Any] = {"vocab_size": 61, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    for name, changes in {"fits": {}, "vocabulary": {"vocab_size": 60}, "short": {"n_positions": 8}}.items():
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**(sizes | changes))).save_pretrained(root / name)
    bert = transformers.BertConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertForPreTraining(bert).save_pretrained(root / "bert")
    return root


def student(load: str, flags: str = "") -> RunConfig:
    return load_config(f"{RUN} --num-layers 1 --train-iters 1 --teacher-load {load} {flags}".split())


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        ("hf:{0}/vocabulary", "", "the teacher's vocabulary has 60 tokens and the student's 61"),
        ("hf:{0}/short", "", "seq_length=16 must not exceed max_position_embeddings=8"),
        ("hf:{0}/bert", "", "the teacher is of model_family=bert and the student of gpt"),
        ("hf:{0}/fits", "--num-attention-heads 4 --tensor-model-parallel-size 4", "must divide num_attention_heads=2"),
        ("hf:{0}/nothing", "", "config.json does not exist"),
        ("{0}/nothing", "", "--teacher-load {0}/nothing holds no checkpoint"),
        ("{0}/fits", "", "--teacher-load {0}/fits holds no checkpoint"),
    ],
)
def test_one_that_cannot_teach_is_refused_before_ranks_meet(
    folders: Path, name: str, flags: str, expected: str
) -> None:
    config = student(name.format(folders), flags)
    with pytest.raises(MegalmError) as error:
        find_teacher(config)
    assert expected.format(folders) in str(error.value)
    assert "2 problems" not in str(error.value)


def test_a_vocabulary_that_only_the_teacher_tells_bounds_the_likeliest(folders: Path) -> None:
    config = student(f"hf:{folders}/fits")
    unknown = config.model.model_copy(update={"vocab_size": None})
    asked = config.distillation.model_copy(update={"logit_kl_topk": 62})
    config = config.model_copy(update={"model": unknown, "distillation": asked})
    with pytest.raises(MegalmError, match="logit_kl_topk=62 is more than vocab_size=61"):
        find_teacher(config)


def test_another_tokenizer_is_another_vocabulary(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_teacher(student(f"hf:{folders}/fits"))
    assert found is not None
    own = TeacherFolder(found.folder, found.model, "a" * 64, is_hugging_face=False)
    monkeypatch.setattr(TeacherFolder, "find", lambda load: own)
    assert find_teacher(student("x"), "a" * 64) is own
    with pytest.raises(MegalmError, match="trained with another tokenizer"):
        find_teacher(student("x"), "b" * 64)


def test_weights_and_settings_are_its_identity(folders: Path, tmp_path: Path) -> None:
    before = TeacherFolder.find(f"hf:{folders}/fits").identity()
    copy = Path(shutil.copytree(folders / "fits", tmp_path / "copy"))
    assert TeacherFolder.find(f"hf:{copy}").identity() == before
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 0.1}))
    assert TeacherFolder.find(f"hf:{copy}").identity() != before
    shutil.copy(folders / "fits" / "config.json", copy)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert TeacherFolder.find(f"hf:{copy}").identity() != before
