"""Files to chunks to documents: nothing lost at chunk edges, every fault with its line."""

import gzip
import hashlib
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.data import readers
from megalm.data.readers import InputFile, Rejected, json_documents, line_chunks
from megalm.errors import DataError


def documents(path: Path, *keys: str) -> list[Any]:
    file = InputFile(str(path))
    return [document for chunk in file.chunks() for document in file.format.documents(chunk, keys or ("text",))]


@given(st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")), max_size=30), st.integers(1, 20))
def test_chunks_put_together_are_the_file_and_know_their_line(lines: list[bytes], chunk_bytes: int) -> None:
    content = b"\n".join(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "CHUNK_BYTES", chunk_bytes)
        chunks = list(line_chunks("f", io.BytesIO(content)))
    expected = content
    if content.startswith(readers.BOM) and chunk_bytes >= 3:
        expected = content[3:]
    assert b"".join(chunk.content for chunk in chunks) == expected
    before = b""
    for chunk in chunks:
        assert chunk.first_line == before.count(b"\n") + 1
        assert chunk is chunks[-1] or chunk.content.endswith(b"\n")
        before += chunk.content


@pytest.mark.parametrize("chunk_bytes", [1, 3, 8, 100])
def test_a_line_that_is_too_long_is_rejected_alone(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 5)
    content = b"1\n" + b"x" * 120 + b"\n3\n4"
    chunks = list(line_chunks("f", io.BytesIO(content)))
    assert max(len(chunk.content) for chunk in chunks) <= 5 + 2 * chunk_bytes
    found = [document for chunk in chunks for document in json_documents(chunk, ("text",))]
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
        (b'{"text": 5}', "not a string", '"text" holds int'),
        (b'{"text": null}', "not a string", "NoneType"),
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
    list(file.chunks())
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
    for name in ("f.parquet", "f", "f.gz"):
        with pytest.raises(DataError, match=r"cannot tell the format of .*must end in \.jsonl"):
            InputFile(str(tmp_path / name))
    (tmp_path / "corpus.jsonl").write_text("")
    with pytest.raises(DataError, match=r'cannot read .*corpu\.jsonl: No such file.*did you mean ".*corpus\.jsonl"'):
        InputFile(str(tmp_path / "corpu.jsonl"))
