"""Model folders of transformers as checkpoints: converted both ways, trained on, and every broken one refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megalm.checkpoint.hugging_face import HuggingFaceReader, export_model, import_model
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.streaming import write_tensors
from megalm.cli import main
from megalm.config.hugging_face import ARCHITECTURES
from megalm.errors import CheckpointError, ConfigError, MegalmError
from megalm.storage.durable import sha256_of

SIZES = {"vocab_size": 99, "hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
SIZES |= {"intermediate_size": 40, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with fused weights, in bf16."""
    folder = tmp_path_factory.mktemp("phi") / "model"
    torch.manual_seed(0)
    config = transformers.Phi3Config(**SIZES, num_key_value_heads=2, pad_token_id=0, eos_token_id=7)
    transformers.Phi3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def broken(phi: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(phi, tmp_path / "broken"))


def change(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_there_and_back_gives_the_same_bytes(phi: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, back = tmp_path / "run", tmp_path / "back"
    assert main(["convert", "from-hf", str(phi), "--save", str(run)]) == 0
    assert main(["convert", "to-hf", str(run), str(back)]) == 0
    said = capsys.readouterr().out
    assert said.count("largest difference from transformers") == 2
    before, after = load_file(phi / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.bfloat16 for name in before)
    assert json.loads((back / "config.json").read_text())["eos_token_id"] == 7


def test_files_of_any_size_hold_the_same(phi: Path, tmp_path: Path) -> None:
    """Several shards on both sides; the index leads to them."""
    import_model(phi, tmp_path / "run", shard_bytes=8_000)
    reader = CheckpointReader(tmp_path / "run" / "step_0")
    assert len(reader.manifest.files) > 5
    export_model(reader, tmp_path / "back", shard_bytes=8_000)
    assert not (tmp_path / "back" / "model.safetensors").exists()
    first, second = HuggingFaceReader(phi), HuggingFaceReader(tmp_path / "back")
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.names)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")


def test_a_class_that_cannot_hold_the_model_is_refused(phi: Path, tmp_path: Path) -> None:
    import_model(phi, tmp_path / "run")
    reader = CheckpointReader(tmp_path / "run" / "step_0")
    with pytest.raises(MegalmError, match="GPT2LMHeadModel"):
        export_model(reader, tmp_path / "back", architecture="GPT2LMHeadModel")
    assert not (tmp_path / "back").exists()


def lose_a_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))


def add_a_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update(surplus=torch.zeros(2)))


def misshape(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(23)}))


def rewrite(folder, change_tensors) -> None:
    tensors = load_file(folder / "model.safetensors")
    change_tensors(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


BROKEN = {
    "no folder": (lambda folder: shutil.rmtree(folder), "does not exist"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "a pickle": (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickle"),
    "cut off": (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10"), "cannot be read"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "must hold an object"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
    "deep": (lambda folder: (folder / "config.json").write_text("[" * 100_000), "cannot be read"),
    "another class": (lambda folder: change(folder, architectures=["BambaForCausalLM"]), "BambaForCausalLM"),
    "quantized": (lambda folder: change(folder, quantization_config={"bits": 4}), "quantization_config"),
    "an activation": (lambda folder: change(folder, hidden_act="mish"), "hidden_act='mish'"),
    "rotary scaling": (lambda folder: change(folder, rope_parameters={"rope_type": "longrope"}), "longrope"),
    "a word for a number": (lambda folder: change(folder, hidden_size="wide"), "hidden_size='wide'"),
    "negative layers": (lambda folder: change(folder, num_hidden_layers=-2), "num_layers=-2"),
    "a tensor less": (lose_a_tensor, "model.norm.weight is missing"),
    "a tensor more": (add_a_tensor, "surplus is unknown"),
    "a shape": (misshape, r"model.norm.weight has shape \(23,\), not \(24,\)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_error(broken: Path, name: str, tmp_path: Path) -> None:
    harm, text = BROKEN[name]
    harm(broken)
    with pytest.raises((CheckpointError, ConfigError), match=text):
        import_model(broken, tmp_path / "run")
    assert not (tmp_path / "run" / "latest").exists()


def pickle_weights(folder: Path, *, shards: int = 1, zipped: bool = True) -> None:
    """The weights as torch's own files in place of safetensors."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, files = sorted(tensors), ["pytorch_model.bin"]
    if shards > 1:
        files = [f"pytorch_model-{number:05d}-of-{shards:05d}.bin" for number in range(1, shards + 1)]
        weight_map = {name: files[number % shards] for number, name in enumerate(names)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for number, file in enumerate(files):
        some = {name: tensors[name] for name in names[number::shards]}
        torch.save(some, folder / file, _use_new_zipfile_serialization=zipped)


@pytest.mark.parametrize("how", [{}, {"shards": 2}, {"zipped": False}], ids=["one file", "shards", "before torch 1.6"])
def test_pickles_are_read_where_the_user_allows_it(broken: Path, how: dict[str, Any], tmp_path: Path) -> None:
    expected = {name: HuggingFaceReader(broken).read(name) for name in HuggingFaceReader(broken).names}
    pickle_weights(broken, **how)
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        import_model(broken, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    assert (
        main(["convert", "from-hf", str(broken), "--save", str(tmp_path / "run"), "--allow-pickle", "--no-check"]) == 0
    )
    found = CheckpointReader(tmp_path / "run" / "step_0")
    assert all(torch.equal(found.read(name, "weight"), expected[name]) for name in expected)


class Harm:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harmed"),)


@pytest.mark.parametrize("content", [{"lm_head.weight": Harm()}, {"step": 3}, [torch.zeros(2)], b"no pickle"])
def test_a_pickle_of_more_than_tensors_is_one_error(
    broken: Path, content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (broken / "model.safetensors").unlink()
    if isinstance(content, bytes):
        (broken / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, broken / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin (cannot be read as|must hold) tensors"):
        import_model(broken, tmp_path / "run", allow_pickle=True)
    assert not (tmp_path / "run").exists()
    assert not Path("harmed").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_are_written_as_the_library_writes_them(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5).t(), "b": torch.randn(7), "c": torch.zeros(0, 2), "d": torch.tensor(2.5)}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    digest = write_tensors(tmp_path / "ours", shapes, dtype, tensors.__getitem__, {"format": "pt"})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert digest == sha256_of(tmp_path / "theirs")


def test_every_class_has_names_of_tensors() -> None:
    from megalm.models.families import FAMILIES

    known = {name for family in FAMILIES.values() for name in family.hugging_face}
    assert known == set(ARCHITECTURES)
