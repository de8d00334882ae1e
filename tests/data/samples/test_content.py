"""What tells on resume that the data is still the data, and on start that the flags fit it."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalm.config.data import DataConfig
from megalm.config.merging.load import load_config
from megalm.config.rules.completion import complete_model
from megalm.data.indexed.manifest import manifest_bytes, manifest_path
from megalm.data.indexed.reader import IndexedDataset
from megalm.data.indexed.writer import IndexedDatasetBuilder
from megalm.data.run_data import RunData
from megalm.data.samples.blended_dataset import BlendedDataset, OrderRecord
from megalm.data.samples.build import build_datasets
from megalm.data.samples.source import Sampling, Source
from megalm.data.tools.merge import merge
from megalm.errors import CheckpointError, DataError
from megalm.objectives.causal import CausalObjective

TOKENS, LENGTH = 1_500_000, 1000


def write(prefix: Path, *, manifest: bool = True, append_eod: bool | None = None) -> str:
    """1,500 documents, 3 MB, of ids below 100; with `append_eod` each ends with 0."""
    tokens = np.random.default_rng(1).integers(1, 100, TOKENS)
    if append_eod:
        tokens[LENGTH - 1 :: LENGTH] = 0
    with IndexedDatasetBuilder(prefix, "uint16") as builder:
        builder.add_documents(tokens, np.full(TOKENS // LENGTH, LENGTH))
        files = builder.finalize()
    options = {} if append_eod is None else {"append_eod": append_eod}
    content = {"options": options, "bin": {"bytes": files.bin_bytes, "sha256": files.bin_sha256}}
    if manifest:
        manifest_path(str(prefix)).write_bytes(manifest_bytes(content))
    return str(prefix)


def source(prefix: str) -> Source:
    indexed = IndexedDataset(prefix)
    return Source(indexed, range(len(indexed)), Sampling(seq_length=64, seed=1))


def record_of(prefix: str) -> OrderRecord:
    record = BlendedDataset([source(prefix)], None, 100).record(10)
    return OrderRecord.from_json(json.loads(json.dumps(asdict(record))))


def go_on(prefix: str, record: OrderRecord, **options: Any) -> BlendedDataset:
    return BlendedDataset([source(prefix)], None, 100, record=record, **options)


def overwrite_between_the_samples(prefix: str) -> float:
    """Writes zeros over all that the fingerprint does not look at; the share of the file that changed."""
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    kept = np.zeros(len(content), dtype=bool)
    for number in range(256):
        start = (len(content) - 4096) * number // 255
        kept[start : start + 4096] = True
    changed = np.frombuffer(bytes(content), np.uint8).copy()
    changed[~kept] = 0
    Path(f"{prefix}.bin").write_bytes(changed.tobytes())
    return float((~kept).mean())


def test_data_that_was_overwritten_is_noticed_by_its_hash(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d")
    record = record_of(prefix)
    before = IndexedDataset(prefix).fingerprint()
    go_on(prefix, record)
    assert overwrite_between_the_samples(prefix) > 0.6
    assert IndexedDataset(prefix).fingerprint() == before, "a sample does not tell"
    with pytest.raises(CheckpointError, match=r"d\.bin is not what the run began with"):
        go_on(prefix, record)
    go_on(prefix, record, verify=False)  # other ranks leave it to one
    go_on(prefix, record, allow_changed=True)


def test_data_that_was_copied_or_touched_is_hashed_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix, hashed = write(tmp_path / "d"), []
    record = record_of(prefix)
    from megalm.data.samples import content

    real = content.sha256_of
    monkeypatch.setattr(content, "sha256_of", lambda path: hashed.append(path) or real(path))
    go_on(prefix, record)
    assert not hashed, "the time tells"
    for end in ("bin", "idx", "manifest.json"):
        shutil.copy(f"{prefix}.{end}", tmp_path / f"copy.{end}")
    os.utime(tmp_path / "copy.bin", (1, 1))
    go_on(str(tmp_path / "copy"), record)
    assert hashed == [f"{tmp_path}/copy.bin"]


def test_data_without_a_manifest_and_records_of_before_go_on(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", manifest=False)
    record = record_of(prefix)
    os.utime(f"{prefix}.bin", (1, 1))
    go_on(prefix, record)
    stored = asdict(record)
    for dataset in stored["datasets"]:
        del dataset["content"]
    go_on(prefix, OrderRecord.from_json(stored))


def build(prefix: str, **settings: Any) -> Any:
    options: dict[str, Any] = {"seq_length": 16, "num_samples": (10, 2, 2), "seed": 1, "vocab_size": 100, "eod": 0}
    return build_datasets(DataConfig(data_path=(prefix,), **settings), **options)


@pytest.mark.parametrize("flag", ["reset_attention_mask", "reset_position_ids", "eod_mask_loss"])
@pytest.mark.parametrize("told", [False, None])
def test_flags_that_need_document_ends_are_refused_without(tmp_path: Path, flag: str, told: bool | None) -> None:
    prefix = write(tmp_path / "d", append_eod=told)
    build(prefix)
    with pytest.raises(DataError, match=f"so --{flag.replace('_', '-')} would do nothing"):
        build(prefix, **{flag: True})
    build(write(tmp_path / "with", append_eod=True), **{flag: True})


def test_sets_with_and_without_document_ends_are_not_joined(tmp_path: Path) -> None:
    sets = {ends: write(tmp_path / f"{ends}", append_eod=ends) for ends in (True, False, None)}
    with pytest.raises(DataError, match=r"True end with an end-of-document token .* those of .*False do not"):
        merge([sets[True], sets[None], sets[False]], str(tmp_path / "all"))
    assert not (tmp_path / "all.bin").exists()
    merge([sets[False], sets[False]], str(tmp_path / "without"))
    assert json.loads((tmp_path / "without.manifest.json").read_text())["options"]["append_eod"] is False
    merge([sets[True], sets[None]], str(tmp_path / "unknown"))


@pytest.mark.parametrize("split", ["969, 30, 1", "969,30,1", "99.9, 0.05, 0.05"])
def test_a_test_share_that_is_too_small_is_no_reason_to_stop(
    tmp_path: Path, split: str, write_dataset: Any, caplog: Any
) -> None:
    prefix = str(write_dataset(tmp_path / "d", [4] * 2000, vocab_size=100))
    data = DataConfig(data_path=(prefix,), split=split)
    with caplog.at_level("INFO", "megalm"):
        built = build_datasets(data, seq_length=3, num_samples=(10, 0, 5), seed=1, vocab_size=100)
        assert built.test is not None
        built = build_datasets(data, seq_length=100, num_samples=(10, 0, 5), seed=1, vocab_size=100)
    assert built.test is None
    assert "no test set" in caplog.text


def test_a_split_that_leaves_training_nothing_is_an_error(tmp_path: Path, write_dataset: Any) -> None:
    prefix = str(write_dataset(tmp_path / "d", [100] * 40, vocab_size=200))
    flags = f"--data-path {prefix} --split 0,100,0 --tokenizer-type ByteLevelTokenizer --num-layers 2 --hidden-size 8"
    flags += (
        " --num-attention-heads 2 --seq-length 16 --micro-batch-size 1 --global-batch-size 2 --train-iters 3 --lr 0.1"
    )
    config = load_config(flags.split())
    config = config.model_copy(update={"model": complete_model(config, 257)})
    with pytest.raises(DataError, match='--split "0,100,0" leaves training nothing'):
        RunData.build(
            config, None, CausalObjective(), rank=0, size=1, pin_memory=False, trained_samples=6, record=None
        )  # fmt: skip
