"""Files to chunks to documents: nothing lost at chunk edges, every fault with its line."""

import gzip
import hashlib
import io
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.data.text import formats as readers
from megalm.data.text.formats import Document, LineRange, Reading, Rejected, json_documents, line_chunks
from megalm.data.text.input_file import InputFile
from megalm.data.text.inputs import expand
from megalm.errors import DataError


def documents(path: Path, *keys: str, **reading: Any) -> list[Any]:
    found = InputFile(str(path)).documents(Reading(keys=keys or ("text",), **reading))
    return [document.texts if isinstance(document, Document) else document for document in found]


def ranged(content: bytes, cuts: list[int]) -> list[list[bytes]]:
    edges = sorted({0, len(content), *(cut for cut in cuts if cut < len(content))})
    parts = []
    for start, stop in itertools.pairwise(edges):
        stream = LineRange(io.BytesIO(content), start, stop)
        parts.append([line for chunk in line_chunks("f", stream, Reading()) for line in chunk.content.splitlines(True)])
    return parts


@given(st.text("ab\n", max_size=60), st.lists(st.integers(1, 60), max_size=5), st.integers(1, 9))
def test_ranges_give_each_line_to_the_range_in_which_it_starts(text: str, cuts: list[int], chunk_bytes: int) -> None:
    content = text.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "CHUNK_BYTES", chunk_bytes)
        parts = ranged(content, cuts)
    assert [line for part in parts for line in part] == content.splitlines(True)
    position = 0
    edges = sorted({0, len(content), *(cut for cut in cuts if cut < len(content))})
    for (start, stop), part in zip(itertools.pairwise(edges), parts, strict=True):
        for line in part:
            assert start <= position < stop
            position += len(line)


@given(st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")), max_size=30), st.integers(1, 20))
def test_chunks_put_together_are_the_file_and_know_their_line(lines: list[bytes], chunk_bytes: int) -> None:
    content = b"\n".join(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "CHUNK_BYTES", chunk_bytes)
        chunks = list(line_chunks("f", io.BytesIO(content), Reading()))
    assert b"".join(chunk.content for chunk in chunks) == content
    before = b""
    for chunk in chunks:
        assert chunk.num_lines == max(1, chunk.content.count(b"\n"))
        assert chunk.first_line == before.count(b"\n") + 1
        assert chunk is chunks[-1] or chunk.content.endswith(b"\n")
        before += chunk.content


@pytest.mark.parametrize("chunk_bytes", [1, 3, 8, 100])
def test_a_line_that_is_too_long_is_rejected_alone(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", chunk_bytes)
    reading = Reading(max_line_bytes=5)
    content = b"1\n" + b"x" * 120 + b"\n3\n4"
    chunks = list(line_chunks("f", io.BytesIO(content), reading))
    assert max(len(chunk.content) for chunk in chunks) <= 5 + 2 * chunk_bytes
    found = [document for chunk in chunks for document in json_documents(chunk, reading)]
    assert all(isinstance(rejected, Rejected) for rejected in found)
    assert [(rejected.line, rejected.kind) for rejected in found] == [
        (1, "not an object"), (2, "line too long"), (3, "not an object"), (4, "not an object"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "kind", "detail"),
    [
        (b'{"text": "a"', "invalid JSON", "at column 13"),
        (b"[" * 100_000, "invalid JSON", "recursion"),
        (b'{"text": "\xff"}', "invalid UTF-8", "byte 11"),
        (b'["text"]', "not an object", "list"),
        (b'{"txt": "a"}', "missing key", '"text" is not among txt'),
        (b'{"text": 5}', "not a string", '"text" holds a number'),
        (b'{"text": null}', "not a string", '"text" holds null'),
        (b'{"text": "\\ud800"}', "lone surrogate", 'character 1 of "text"'),
    ],
)
def test_a_bad_line_is_rejected_with_its_number(tmp_path: Path, line: bytes, kind: str, detail: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good too"}')
    found = documents(path)
    assert found[0] == ("good",)
    assert found[2] == ("good too",)
    rejected = found[1]
    assert isinstance(rejected, Rejected)
    assert (rejected.line, rejected.kind) == (3, kind)
    assert detail in rejected.detail
    assert str(rejected).startswith(f"{path}:3: {kind}: ")


def test_bom_crlf_nul_and_unicode_line_ends_are_text(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\\u0000b"}\r\n{"text": "c\xe2\x80\xa8d"}\r\n')
    assert documents(path) == [("a\0b",), ("c\u2028d",)]


def test_several_keys_come_in_the_order_asked(tmp_path: Path) -> None:
    path = tmp_path / "f.ndjson"
    path.write_text('{"a": "1", "b": "2"}\n')
    assert documents(path, "b", "a") == [("2", "1")]


def test_gzip_is_read_and_the_stored_bytes_are_hashed(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n') + gzip.compress(b'{"text": "b"}\n'))
    assert documents(path) == [("a",), ("b",)]
    file = InputFile(str(path))
    list(file.chunks(Reading()))
    assert (file.bytes_read, file.size) == (path.stat().st_size,) * 2
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("damage", [lambda c: c[:-9], lambda c: c[:40] + b"\0" * 8 + c[48:], lambda c: b"no" + c])
def test_damaged_gzip_is_an_error(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "f.jsonl.gz"
    lines = b"".join(b'{"text": "%d"}\n' % (i * i) for i in range(1000))
    path.write_bytes(damage(gzip.compress(lines)))
    with pytest.raises(DataError, match=r"f\.jsonl\.gz is damaged or cut off"):
        documents(path)


def test_unknown_endings_and_missing_files_are_named(tmp_path: Path) -> None:
    for name in ("f.csv", "f", "f.gz", "f.parquet.gz"):
        with pytest.raises(DataError, match=r"cannot tell the format of .*must end in \.jsonl"):
            InputFile(str(tmp_path / name))
    (tmp_path / "corpus.jsonl").write_text("")
    with pytest.raises(DataError, match=r'cannot read .*corpu\.jsonl: No such file.*did you mean ".*corpus\.jsonl"'):
        InputFile(str(tmp_path / "corpu.jsonl"))


@pytest.mark.parametrize("text", ["a\n\nb\nc\n", "\n\n a\n \t\n\nb\nc", "\r\na\r\n\r\nb\r\nc\r\n\r\n"])
@pytest.mark.parametrize("chunk_bytes", [1, 2, 5, 100])
def test_text_is_cut_at_blank_lines(
    tmp_path: Path, text: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", chunk_bytes)
    (tmp_path / "f.txt").write_bytes(text.encode())
    found = [document[0].replace("\r", "").strip(" ") for document in documents(tmp_path / "f.txt")]
    assert found == ["a", "b\nc"]


def test_a_text_document_that_is_too_long_is_rejected_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 7)
    (tmp_path / "f.txt").write_text("one\n\n" + "too\nlong\n" * 9 + "\nthree\n\n" + "x" * 90 + "\n\nfive")
    found = documents(tmp_path / "f.txt", max_line_bytes=20)
    assert [found[0], found[2], found[4]] == [("one",), ("three",), ("five",)]
    assert [(found[i].line, found[i].kind) for i in (1, 3)] == [(3, "line too long"), (24, "line too long")]


def test_a_text_file_can_be_one_document(tmp_path: Path) -> None:
    (tmp_path / "f.txt").write_text("a\n\nb\n")
    assert documents(tmp_path / "f.txt", text_documents="file") == [("a\n\nb\n",)]
    found = documents(tmp_path / "f.txt", text_documents="file", max_line_bytes=3)
    assert [fault.kind for fault in found] == ["line too long"]


def test_zstd_is_read_frame_by_frame_and_a_cut_is_noticed(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    lines = [b'{"text": "%d"}\n' % (i * i) for i in range(5000)]
    frames = [zstandard.compress(b"".join(lines[i : i + 1000])) for i in range(0, 5000, 1000)]
    path = tmp_path / "f.jsonl.zst"
    path.write_bytes(b"".join(frames))
    assert documents(path) == [(str(i * i),) for i in range(5000)]
    for cut in (-3, -len(frames[-1]) + 5):
        path.write_bytes(b"".join(frames)[:cut])
        with pytest.raises(DataError, match=r"f\.jsonl\.zst is damaged or cut off"):
            documents(path)


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = arrow.table({"text": ["a", None, "c", "d"], "n": [1, 2, 3, 4], "b": ["w", "x", "y", "z"]})
    parquet.write_table(table, tmp_path / "f.parquet", row_group_size=3)
    found = documents(tmp_path / "f.parquet", "text", "b")
    assert [found[0], found[2], found[3]] == [("a", "w"), ("c", "y"), ("d", "z")]
    assert (found[1].line, found[1].kind) == (2, "not a string")
    with pytest.raises(DataError, match=r'has no column txt; .*did you mean "text"'):
        documents(tmp_path / "f.parquet", "txt")
    (tmp_path / "f.parquet").write_bytes((tmp_path / "f.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"f\.parquet is damaged or cut off"):
        documents(tmp_path / "f.parquet")


def test_repair_reads_what_is_no_unicode(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'{"text": "a\xffb"}\n{"text": "a\\ud800b\\ud83d\\ude00"}\n')
    assert documents(path, repair=True) == [("a\ufffdb",), ("a\ufffdb\U0001f600",)]


def test_repaired_documents_say_so(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_bytes(b'{"text": "a\xff"}\n{"text": "\\ud800"}\n{"text": "b"}\n')
    found = list(InputFile(str(tmp_path / "f.jsonl")).documents(Reading(repair=True)))
    assert [(document.texts, document.repaired) for document in found if isinstance(document, Document)] == [
        (("a\ufffd",), True), (("\ufffd",), True), (("b",), False),
    ]  # fmt: skip


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_compressed_file_of_no_bytes_is_cut_off(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"f.jsonl.{ending}").write_bytes(b"")
    with pytest.raises(DataError, match=r"is damaged or cut off: it is empty"):
        documents(tmp_path / f"f.jsonl.{ending}")


def test_binary_columns_are_texts_or_rejected_by_the_same_rule(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [b"a", "é".encode(), b"\xff"]}), tmp_path / "f.parquet")
    found = documents(tmp_path / "f.parquet")
    assert found[:2] == [("a",), ("é",)]
    assert found[2].kind == "invalid UTF-8"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{\n  "text": "x"\n}\n', "over several lines, .*jq -c"),
        ("a.jsonl", b"\xef\xbb\xbf \n{\r\n", "over several lines"),
        ("a.json", b'[{"text": "x"}]', r"one JSON array, .*jq -c '\.\[\]'"),
        ("a.jsonl", '{"text": "x"}\n'.encode("utf-16"), "UTF-16.* iconv"),
        ("a.txt", bytes(5000), r"zeros \(4096 .*copy it again"),
        ("a.jsonl", ('{"text": "' + "x" * 50 + '"}').encode("utf-16-le"), "UTF-16"),
        ("a.txt", ("word " * 20).encode("utf-16-be"), "UTF-16"),
        ("a.jsonl", gzip.compress(b'{"text": "x"}', mtime=0), r"gzip, .*ends in \.gz"),
        ("a.txt", b"\x28\xb5\x2f\xfdxx", r"zstd, .*\.zst"),
        ("a.jsonl", b"PAR1....PAR1", r"Parquet, .*\.parquet"),
        ("a.txt", b"PK\x03\x04", "zip"),
    ],
)
def test_a_file_that_is_something_else_says_what_to_do(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} cannot be read: it holds .*{message}"):
        InputFile(str(tmp_path / name))


@pytest.mark.parametrize("content", [b"", b"{", b'{"text": "x"}', b"\0\0", b"x" * 5000, b"\n\n", b'{"a": [\n'])
def test_what_may_be_what_it_says_is_read(tmp_path: Path, content: bytes) -> None:
    for name in ("a.jsonl", "a.txt") if content != b"{" else ("a.txt",):
        (tmp_path / name).write_bytes(content)
        InputFile(str(tmp_path / name))


def test_a_line_can_be_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n\n  \ntwo words\r\nthree\n\xff\nlast")
    *found, last = documents(tmp_path / "a.txt", text_documents="line")
    assert found[:3] == [("one",), ("two words",), ("three",)]
    assert isinstance(found[3], Rejected)
    assert (found[3].line, found[3].kind) == (6, "invalid UTF-8")
    assert last == ("last",)


def test_a_clone_from_a_hub_is_its_data(tmp_path: Path) -> None:
    for name in ("README.md", "dataset_infos.json", "data/a.jsonl", "data/state.json", "LICENSE.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    found = expand([str(tmp_path)])
    assert found.files == [str(tmp_path / "data/a.jsonl")]
    assert len(found.left_out) == 4
    assert expand([str(tmp_path / "LICENSE.txt")]).files, "asked for by its name"
