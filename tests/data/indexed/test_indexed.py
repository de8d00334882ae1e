"""The .bin/.idx files: byte for byte as the specification and megatron-core, and every damage named at open."""

import fcntl
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalm.data.indexed.format import best_dtype
from megalm.data.indexed.reader import IndexedDataset
from megalm.data.indexed.writer import IndexedDatasetBuilder
from megalm.errors import DataError
from megalm.storage.atomic import open_locked

Write = Callable[..., Path]

DOCUMENTS = [[[1, 2, 3], [4]], [[5, 6]], [], [[7, 8, 9, 10]]]
"""Sequences per document: one document of two sequences, one without any."""


def build(prefix: Path, dtype: str) -> None:
    with IndexedDatasetBuilder(prefix, dtype) as builder:
        for document in DOCUMENTS:
            flat = [token for sequence in document for token in sequence]
            builder.add_document(flat, [len(sequence) for sequence in document])
        builder.finalize()


def test_files_have_the_specified_bytes(tmp_path: Path) -> None:
    build(tmp_path / "d", "uint16")
    assert (tmp_path / "d.bin").read_bytes() == struct.pack("<10H", *range(1, 11))
    expected = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 4, 5)
    expected += struct.pack("<4i", 3, 1, 2, 4) + struct.pack("<4q", 0, 6, 8, 12) + struct.pack("<5q", 0, 2, 3, 3, 4)
    assert (tmp_path / "d.idx").read_bytes() == expected


def test_a_users_program_writes_and_reads_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(page.partition("```python\n")[2].partition("```")[0], {})
    np.testing.assert_array_equal(IndexedDataset("counted")[99], np.arange(99, 149))


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_files_equal_megatrons_and_each_reads_the_other(megatron: Any, tmp_path: Path, dtype: str) -> None:
    import torch

    build(tmp_path / "ours", dtype)
    theirs = megatron.indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=getattr(np, dtype))
    for document in DOCUMENTS:
        for sequence in document:
            theirs.add_item(torch.tensor(sequence))
        theirs.end_document()
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    ours_read = IndexedDataset(tmp_path / "theirs")
    theirs_read = megatron.indexed_dataset.IndexedDataset(str(tmp_path / "ours"))
    assert len(ours_read) == len(theirs_read) == 4
    for i in range(4):
        np.testing.assert_array_equal(ours_read[i], theirs_read[i])
    np.testing.assert_array_equal(ours_read.document_indices, theirs_read.document_indices)
    np.testing.assert_array_equal(ours_read.sequence_lengths, theirs_read.sequence_lengths)


def test_reading_by_number_slice_and_range(tmp_path: Path) -> None:
    build(tmp_path / "d", "int32")
    data = IndexedDataset(tmp_path / "d")
    assert (len(data), data.num_tokens, data.dtype) == (4, 10, np.dtype("int32"))
    assert data[1].tolist() == [4]
    assert data[-1].tolist() == [7, 8, 9, 10]
    assert [s.tolist() for s in data[1:3]] == [[4], [5, 6]]
    assert data[3:3] == []
    assert data.get(3, 1, 2).tolist() == [8, 9]
    assert data.get(3, offset=2).tolist() == [9, 10]
    for wrong in [(4, 0, 1), (-5, 0, 1), (3, 1, 4), (3, -1, 1)]:
        with pytest.raises(IndexError):
            data.get(*wrong)


def test_items_and_bulk_documents_write_the_same_as_single_documents(tmp_path: Path, write_dataset: Write) -> None:
    write_dataset(tmp_path / "bulk", [3, 0, 2])
    with IndexedDatasetBuilder(tmp_path / "single", "uint16") as builder:
        for tokens in ([0, 1, 2], [], [3, 4]):
            builder.add_item(tokens)
            builder.end_document()
        files = builder.finalize()
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"bulk.{suffix}").read_bytes() == (tmp_path / f"single.{suffix}").read_bytes()
    assert (files.num_documents, files.num_tokens, files.bin_bytes) == (3, 5, 10)
    assert files.idx_bytes == (tmp_path / "single.idx").stat().st_size


def test_merge_equals_writing_everything_at_once(tmp_path: Path, write_dataset: Write) -> None:
    build(tmp_path / "a", "uint16")
    with IndexedDatasetBuilder(tmp_path / "merged", "uint16") as builder:
        builder.add_index(tmp_path / "a")
        builder.add_index(tmp_path / "a")
        builder.finalize()
    merged = IndexedDataset(tmp_path / "merged")
    assert merged.document_indices.tolist() == [0, 2, 3, 3, 4, 6, 7, 7, 8]
    assert np.concatenate(merged[:]).tolist() == [*range(1, 11), *range(1, 11)]
    write_dataset(tmp_path / "wide", [2], dtype="int32")
    with IndexedDatasetBuilder(tmp_path / "x", "uint16") as builder, pytest.raises(DataError, match="same dtype"):
        builder.add_index(tmp_path / "wide")


@pytest.mark.parametrize(("vocab_size", "name"), [(65499, "uint16"), (65500, "int32"), (None, "int32")])
def test_best_dtype_follows_megatron(vocab_size: int | None, name: str) -> None:
    assert best_dtype(vocab_size) == np.dtype(name)


def test_ids_that_do_not_fit_the_dtype_are_refused_not_wrapped(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "d", "uint16") as builder:
        with pytest.raises(DataError, match=r"65536 do not fit uint16"):
            builder.add_document([1, 65536])
        with pytest.raises(DataError, match="-1"):
            builder.add_document([-1])
        with pytest.raises(DataError, match="integers"):
            builder.add_document([0.5])
    with pytest.raises(DataError, match="float32"):
        IndexedDatasetBuilder(tmp_path / "f", "float32")


def test_nothing_carries_a_final_name_before_finalize_and_nothing_stays_after_an_error(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(tmp_path / "d", "uint16")
    builder.add_document([1, 2])
    builder.prepare()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.bin.partial", "d.idx.partial"]
    with pytest.raises(ZeroDivisionError), builder:
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_an_existing_dataset_is_refused_without_overwrite(tmp_path: Path, write_dataset: Write) -> None:
    write_dataset(tmp_path / "d", [3])
    before = (tmp_path / "d.bin").read_bytes()
    with pytest.raises(DataError, match=r"d\.bin and .*d\.idx exist already"):
        IndexedDatasetBuilder(tmp_path / "d", "uint16")
    assert (tmp_path / "d.bin").read_bytes() == before
    with IndexedDatasetBuilder(tmp_path / "d", "uint16", overwrite=True) as builder:
        builder.add_document([9])
        assert (tmp_path / "d.bin").read_bytes() == before
        builder.finalize()
    assert IndexedDataset(tmp_path / "d")[0].tolist() == [9]


def test_a_second_writer_of_the_same_prefix_is_refused_and_does_no_harm(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "d", "uint16") as builder:
        builder.add_document([1, 2])
        with pytest.raises(DataError, match="being written by another process"):
            IndexedDatasetBuilder(tmp_path / "d", "uint16")
        builder.finalize()
    assert IndexedDataset(tmp_path / "d")[0].tolist() == [1, 2]


def test_what_a_killed_writer_left_is_reused(tmp_path: Path, write_dataset: Write) -> None:
    (tmp_path / "d.bin.partial").write_bytes(b"half a file")
    write_dataset(tmp_path / "d", [2])
    assert IndexedDataset(tmp_path / "d").num_tokens == 2


def test_the_lock_taken_on_a_file_that_was_published_meanwhile_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = tmp_path / "f", []
    (tmp_path / "f.partial").write_bytes(b"finished")
    real = fcntl.flock

    def publish_before_first_lock(stream: Any, operation: int) -> None:
        calls.append(operation)
        if len(calls) == 1:
            (tmp_path / "f.partial").rename(path)
        real(stream, operation)

    monkeypatch.setattr(fcntl, "flock", publish_before_first_lock)
    open_locked(path).close()
    assert path.read_bytes() == b"finished"
    assert len(calls) == 2


def test_a_dataset_without_sequences_is_not_written(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "d", "uint16") as builder, pytest.raises(DataError, match="no sequences"):
        builder.finalize()
    assert list(tmp_path.iterdir()) == []


def patched(position: int, raw: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content[:position] + raw + content[position + len(raw) :]


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        ("idx", lambda c: c[:-8], r"must have 82 bytes for 2 sequences and 3 document boundaries, but has 74"),
        ("idx", lambda c: c[:20], "cut off: 20 bytes"),
        ("idx", lambda c: c + b"\1\1", "multimodal"),
        ("idx", lambda c: b"TNTIDX\0\0" + c[8:], "old TNTIDX layout"),
        ("idx", lambda c: b"something else" + c, "is not an index"),
        ("idx", patched(9, b"\2"), "version 2"),
        ("idx", patched(17, b"\6"), "floating-point"),
        ("idx", patched(17, b"\7"), "floating-point"),
        ("idx", patched(17, b"\11"), "unknown dtype code 9"),
        ("idx", patched(17, b"\4"), "offsets end at byte"),
        ("idx", patched(34, b"\xff\xff\xff\xff"), "negative sequence length"),
        ("idx", patched(74, b"\1"), r"boundaries from 0 to 2, but has \[0, 1\]"),
        ("bin", lambda c: c[:-1], r"d\.bin must have 10 bytes for the 5 tokens \(uint16\).*but has 9"),
        ("bin", lambda c: c + b"\0\0", "but has 12"),
    ],
)
def test_damage_is_named_at_open(
    tmp_path: Path, write_dataset: Write, suffix: str, damage: Callable[[bytes], bytes], message: str
) -> None:
    write_dataset(tmp_path / "d", [3, 2])
    path = tmp_path / f"d.{suffix}"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        IndexedDataset(tmp_path / "d")


def test_an_empty_dataset_of_another_tool_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQq", 1, 8, 0, 1, 0))
    (tmp_path / "d.bin").write_bytes(b"")
    with pytest.raises(DataError, match="no sequences"):
        IndexedDataset(tmp_path / "d")


def test_a_missing_file_is_named(tmp_path: Path, write_dataset: Write) -> None:
    write_dataset(tmp_path / "d", [3])
    (tmp_path / "d.bin").unlink()
    with pytest.raises(DataError, match=r"d\.bin: No such file"):
        IndexedDataset(tmp_path / "d")


def test_a_bin_file_that_shrinks_while_open_is_an_error_not_a_crash(tmp_path: Path, write_dataset: Write) -> None:
    data = IndexedDataset(write_dataset(tmp_path / "d", [5000, 5000]))
    with open(tmp_path / "d.bin", "r+b") as stream:
        stream.truncate(10000)
    assert len(data[0]) == 5000
    with pytest.raises(DataError, match=r"cut while in use: bytes 10000 \.\. 20000"):
        data[1]


def test_a_pickled_dataset_reopens_its_files(tmp_path: Path, write_dataset: Write) -> None:
    data = IndexedDataset(write_dataset(tmp_path / "d", [3, 2]))
    assert pickle.loads(pickle.dumps(data))[1].tolist() == data[1].tolist()


def test_every_token_that_is_read_is_checked(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "d", "int32") as builder:
        builder.add_document([1, 2, 3, 4, 5], [3, 2])
        builder.add_document([6, 9, 7, -2])
        builder.finalize()
    data = IndexedDataset(tmp_path / "d")
    assert data.gather([(2, 1, 2)]).tolist() == [9, 7], "nobody has said how many ids there are"
    data.vocab_size = 9
    again = pickle.loads(pickle.dumps(data))
    assert again.gather([(0, 0, 3), (1, 0, 2), (2, 2, 1)]).tolist() == [1, 2, 3, 4, 5, 7]
    for read in (lambda: again.gather([(1, 0, 2), (2, 0, 2)]), lambda: again.tokens(4, 4), again.check_token_range):
        with pytest.raises(DataError, match=r"d\.bin: token id 9 at position 1 of document 1 is outside 0 \.\. 8"):
            read()
    with pytest.raises(DataError, match=r"token id -2 at position 3 of document 1"):
        again.gather([(2, 2, 2)])
    data.vocab_size = 5
    with pytest.raises(DataError, match=r"token id 5 at position 4 of document 0 \(sequence 1\)"):
        data.tokens(0, 9)


def test_a_look_at_large_datasets_is_bounded(tmp_path: Path, write_dataset: Write) -> None:
    data = IndexedDataset(write_dataset(tmp_path / "d", [1] * 10, vocab_size=10))
    data.vocab_size = 5
    with pytest.raises(DataError, match="token id 6 at position 0 of document 6"):
        data.check_token_range(limit=5)


def test_fingerprint_changes_with_tokens_and_with_lengths(tmp_path: Path, write_dataset: Write) -> None:
    prints = {
        IndexedDataset(write_dataset(tmp_path / name, lengths, vocab_size=vocab)).fingerprint()
        for name, lengths, vocab in [("a", [3, 2], 5), ("b", [2, 3], 5), ("c", [3, 2], 4), ("d", [3, 2], 5)]
    }
    assert len(prints) == 3


def test_parts_are_gathered_and_a_cut_file_is_an_error(tmp_path: Path, write_dataset: Write) -> None:
    indexed = IndexedDataset(write_dataset(tmp_path / "d", [5, 7, 9]))
    assert indexed.gather([(1, 2, 3), (0, 0, 2), (2, 8, 1)]).tolist() == [7, 8, 9, 0, 1, 20]
    os.truncate(tmp_path / "d.bin", 20)
    with pytest.raises(DataError, match=r"d\.bin was cut while in use"):
        indexed.gather([(0, 0, 2), (2, 0, 9)])
