"""Files of a dataset that are well-formed and wrong: one error each, or what they said before; never a traceback."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalm.data.indexed.manifest import check_tokenizer, manifest_path, read_manifest
from megalm.data.indexed.reader import IndexedDataset
from megalm.data.indexed.writer import IndexedDatasetBuilder
from megalm.data.tools import inspect, verify
from megalm.errors import DataError

GOOD: dict[str, Any] = {
    "megalm": "0.1", "fingerprint": "ab", "inputs": [{"path": "a.jsonl", "bytes": 3, "sha256": "0" * 64}],
    "options": {"append_eod": True, "min_chars": None},
    "tokenizer": {"type": "ByteLevelTokenizer", "identity": "1" * 64, "vocab_size": 257, "eod": 256},
    "documents": 2, "sequences": 2, "tokens": 5, "dtype": "uint16",
    "bin": {"bytes": 10, "sha256": "2" * 64}, "idx": {"bytes": 82, "sha256": "3" * 64},
}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "no manifest of a dataset: it"), ("3", "no manifest of a dataset"), ("null", "no manifest"),
        ('"x"', "no manifest"), ("{", "cannot read"), ("", "cannot read"), ("\xff", "cannot read"),
        ("[" * 100_000, "nested too deep"), ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deep"),
        ('{"tokenizer": []}', "tokenizer"), ('{"tokenizer": {"identity": 5}}', r"tokenizer\.identity"),
        (json.dumps({"tokenizer": GOOD["tokenizer"] | {"vocab_size": "many"}}), r"tokenizer\.vocab_size"),
        (json.dumps({"tokenizer": GOOD["tokenizer"] | {"vocab_size": True}}), r"tokenizer\.vocab_size"),
        (json.dumps({"tokenizer": GOOD["tokenizer"] | {"identity": ["1"]}}), r"tokenizer\.identity"),
        ('{"bin": 3}', "bin"), ('{"bin": {"bytes": -1, "sha256": "x"}}', r"bin\.bytes"), ('{"inputs": {}}', "inputs"),
        ('{"inputs": [3]}', r"inputs\.0"), ('{"options": {"append_eod": "yes"}}', r"options\.append_eod"),
        ('{"tokens": 1.5}', "tokens"), ('{"documents": -1}', "documents"),
    ],
)  # fmt: skip
def test_a_manifest_of_the_wrong_shape_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = manifest_path(str(tmp_path / "d"))
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        read_manifest(path)


def test_a_manifest_that_states_no_hashes_verifies_nothing(tmp_path: Path, write_dataset: Callable[..., Path]) -> None:
    prefix = str(write_dataset(tmp_path / "d", [3, 2]))
    manifest_path(prefix).write_text('{"files": {}}')
    with pytest.raises(DataError, match=r"its manifest does not say bin\.sha256 and idx\.sha256"):
        verify.verify(prefix)


def mutated(value: Any, draw: random.Random) -> Any:
    """`value` with one part of it replaced, dropped or doubled."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        if draw.random() < 0.2:
            return {name: inner for name, inner in value.items() if name != key}
        return value | {key: mutated(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        return [mutated(value[0], draw), *value]
    return draw.choice([None, 0, -1, 2**70, 1.5, "", "x", "0" * 64, [], {}, [1], {"a": []}, True, [[]]])


def test_mutants_of_a_manifest_are_read_or_refused(tmp_path: Path, write_dataset: Callable[..., Path]) -> None:
    prefix = str(write_dataset(tmp_path / "d", [3, 2]))
    indexed, draw, accepted = IndexedDataset(prefix), random.Random(5), 0
    for _ in range(1500):
        manifest_path(prefix).write_text(json.dumps(mutated(GOOD, draw)))
        try:
            inspect.describe(indexed)
            check_tokenizer(prefix, "1" * 64)
            accepted += 1
        except DataError:
            pass
    assert 50 < accepted < 1450


@pytest.fixture
def several(tmp_path: Path) -> Path:
    with IndexedDatasetBuilder(tmp_path / "d", "uint16") as builder:
        for lengths in ([4, 3], [5], [], [1, 2, 8], [6]):
            builder.add_document(np.arange(sum(lengths)), lengths)
        builder.finalize()
    return tmp_path / "d"


@pytest.mark.parametrize(
    ("at", "change", "message"),
    [
        (34, {0: 2, 1: -2}, "sequence 1 must start at byte 12, its offset is 8"),
        (34, {2: 1, 4: -1}, "sequence 3 must start at byte"),
        (34 + 28, {3: 2}, "sequence 3 must start at byte 24, its offset is 26"),
        (34 + 28 + 56, {1: 2, 2: -1}, "document 1 ends before it starts"),
    ],
)
def test_inner_values_of_an_index_must_fit_each_other(
    several: Path, at: int, change: dict[int, int], message: str
) -> None:
    path = Path(f"{several}.idx")
    content, size = bytearray(path.read_bytes()), 4 if at == 34 else 8
    for number, difference in change.items():
        place = at + number * size
        value = int.from_bytes(content[place : place + size], "little") + difference
        content[place : place + size] = value.to_bytes(size, "little")
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        IndexedDataset(several)


def test_mutants_of_an_index_are_the_dataset_or_refused(several: Path) -> None:
    path, draw = Path(f"{several}.idx"), random.Random(3)
    good, sequences = path.read_bytes(), IndexedDataset(several)[:]
    for _ in range(1500):
        content = bytearray(good)
        for _ in range(draw.choice([1, 1, 2, 8])):
            content[draw.randrange(len(content))] = draw.choice([0, 1, 2, 255, draw.randrange(256)])
        if draw.random() < 0.1:
            del content[draw.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            found = IndexedDataset(several)
        except DataError:
            continue
        if found.dtype == np.uint16:  # another code of the same size is another dataset
            assert all(np.array_equal(a, b) for a, b in zip(found[:], sequences, strict=True))
        assert (np.diff(found.document_indices) >= 0).all()


def test_an_index_that_is_cut_while_it_is_used_is_an_error(several: Path) -> None:
    from megalm.data.samples.gpt_dataset import GPTDataset

    data = GPTDataset(IndexedDataset(several), range(5), 4, None, 0)
    data[0]
    with open(f"{several}.idx", "r+b") as stream:
        stream.truncate(0)
    with pytest.raises(DataError, match=r"d\.idx was cut while in use"):
        data[1]
