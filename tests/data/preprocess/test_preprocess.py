"""`megalm preprocess`: the same bytes for every number of workers, and nothing half written."""

import argparse
import gzip
import hashlib
import io
import itertools
import json
import subprocess
import sys
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data import preprocess
from megalm.data.indexed.manifest import check_tokenizer
from megalm.data.indexed.reader import IndexedDataset
from megalm.data.preprocess import pipeline as running
from megalm.data.preprocess import pool, shuffle, units
from megalm.data.preprocess.filters import dedup
from megalm.data.preprocess.shards import Batch
from megalm.data.progress import Progress
from megalm.data.text import formats as readers
from megalm.data.tokenizers import ByteLevelTokenizer
from megalm.errors import DataError

BYTES = "--tokenizer-type ByteLevelTokenizer"


def parsed(tmp_path: Path, flags: str = "", inputs: str = "in.jsonl", tokenizer: str = BYTES) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    preprocess.add_arguments(parser)
    files = [str(tmp_path / name) for name in inputs.split()]
    prefix = ["--output-prefix", str(tmp_path / "out")]
    return parser.parse_args(["--input", *files, *prefix, *tokenizer.split(), *flags.split()])


def run(tmp_path: Path, flags: str = "", inputs: str = "in.jsonl", tokenizer: str = BYTES) -> int:
    return preprocess.run(parsed(tmp_path, flags, inputs, tokenizer))


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text, "title": text[:3]}) + "\n" for text in texts))


def texts_of(prefix: Path) -> list[str]:
    data = IndexedDataset(prefix)
    return [ByteLevelTokenizer().decode(data[i].tolist()) for i in range(len(data))]


def outputs(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out"))


def test_documents_come_in_input_order_with_eod(tmp_path: Path) -> None:
    write_lines(tmp_path / "b.jsonl", ["third", "é"])
    write_lines(tmp_path / "a.jsonl", ["first", "", "second"])
    assert run(tmp_path, "--append-eod", "a.jsonl b.jsonl") == 0
    assert texts_of(tmp_path / "out_text_document") == ["first", "second", "third", "é"]
    data = IndexedDataset(tmp_path / "out_text_document")
    assert [int(data[i][-1]) for i in range(4)] == [256] * 4
    assert data.document_indices.tolist() == [0, 1, 1, 2, 3, 4]  # the empty one is a boundary, as Megatron writes it
    assert data.sequence_lengths.min() > 0


ALL = "--dedup exact --shuffle --seed 7 --min-chars 3 --append-eod --json-keys text title"


@pytest.mark.parametrize("flags", ["--json-keys text title", ALL])
def test_output_does_not_depend_on_the_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str
) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 300)
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 1024)
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 4096)
    monkeypatch.setattr(dedup, "PARTITION_BYTES", 512)
    write_lines(tmp_path / "in.jsonl", [f"document {i % 400} " * (i % 17) for i in range(500)])
    written = []
    for workers in (1, 2, 5):
        run(tmp_path, f"--workers {workers} --overwrite {flags}")
        written.append({name: (tmp_path / name).read_bytes() for name in outputs(tmp_path)})
    assert written[0] == written[1] == written[2]
    assert len(written[0]) == 6


def test_the_manifest_tells_where_the_tokens_come_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "in.jsonl", ["some", "text"])
    run(tmp_path, "--append-eod")
    manifest = json.loads((tmp_path / "out_text_document.manifest.json").read_bytes())
    source = (tmp_path / "in.jsonl").read_bytes()
    assert manifest["inputs"] == [
        {"path": str(tmp_path / "in.jsonl"), "bytes": len(source), "sha256": hashlib.sha256(source).hexdigest()}
    ]
    assert (manifest["documents"], manifest["tokens"], manifest["dtype"]) == (2, 10, "uint16")
    tokenizer = {"type": "ByteLevelTokenizer", "identity": ByteLevelTokenizer().identity, "vocab_size": 257, "eod": 256}
    assert manifest["tokenizer"] == tokenizer
    asked = {"append_eod": True, "json_key": "text", "text_documents": "blank-lines", "lang": "english", "dedup": None}
    assert asked.items() <= manifest["options"].items()
    for kind in ("bin", "idx"):
        stored = (tmp_path / f"out_text_document.{kind}").read_bytes()
        assert manifest[kind] == {"bytes": len(stored), "sha256": hashlib.sha256(stored).hexdigest()}
    check_tokenizer(str(tmp_path / "out_text_document"), ByteLevelTokenizer().identity)
    with pytest.raises(DataError, match="made with tokenizer"):
        check_tokenizer(str(tmp_path / "out_text_document"), "0" * 64)
    summary = capsys.readouterr().out
    assert "2 documents, 10 tokens" in summary
    assert "train with --data-path" in summary


def test_existing_output_is_kept_without_overwrite(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", ["one"])
    run(tmp_path)
    write_lines(tmp_path / "in.jsonl", ["two"])
    with pytest.raises(DataError, match=r"exist already; give --overwrite"):
        run(tmp_path)
    assert texts_of(tmp_path / "out_text_document") == ["one"]
    run(tmp_path, "--overwrite")
    assert texts_of(tmp_path / "out_text_document") == ["two"]


def test_units_under_way_are_bounded() -> None:
    taken = 0

    def endless() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield taken, None

    results = pool.in_order(Inline(), endless(), lambda number: number, 6)  # type: ignore[arg-type]
    for done in range(1, 50):
        assert next(results) == (done, done)
        assert taken - done <= 6


class Inline:
    """An executor that does the work at once."""

    def submit(self, function: Any, *arguments: Any) -> Any:
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future


def test_progress_lines_tell_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(1000, every_documents=10)
    for done in range(1, 31):
        progress.update(input_bytes=done * 10, text_bytes=done * 8, documents=done, tokens=done * 4)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[1].startswith(" 20.0% | 20 documents | 80 tokens | ")
    assert lines[1].endswith("s left")


def test_equal_texts_are_written_once_and_the_first_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 500)
    monkeypatch.setattr(dedup, "PARTITION_BYTES", 100)
    texts = [f"text {i * i % 37}" for i in range(300)]
    write_lines(tmp_path / "in.jsonl", texts)
    run(tmp_path, "--dedup exact --workers 2")
    assert texts_of(tmp_path / "out_text_document") == list(dict.fromkeys(texts))
    manifest = json.loads((tmp_path / "out_text_document.manifest.json").read_bytes())
    assert manifest["duplicates"] == 300 - len(set(texts))


def test_shuffle_is_a_permutation_that_follows_from_the_seed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"text {i} " * (i % 9 + 1) for i in range(400)]
    write_lines(tmp_path / "in.jsonl", texts)
    orders = []
    for seed, bucket_bytes in ((1, 1 << 20), (1, 512), (2, 512)):
        monkeypatch.setattr(shuffle, "BUCKET_BYTES", bucket_bytes)
        run(tmp_path, f"--shuffle --seed {seed} --overwrite")
        orders.append(texts_of(tmp_path / "out_text_document"))
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(texts)
    moved = sum(a != b for a, b in zip(orders[0], texts, strict=True))
    assert moved > 380


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(1, 4), max_size=3), max_size=12), st.integers(0, 2**64 - 1), st.integers(1, 40))
def test_shuffled_batches_keep_documents_whole(shapes: list[list[int]], seed: int, bucket_bytes: int) -> None:
    tokens, documents = itertools.count(), []
    for shape in shapes:
        documents.append([[next(tokens) for _ in range(length)] for length in shape])
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "BUCKET_BYTES", bucket_bytes)
        parts = [batch_of(documents[:5]), batch_of(documents[5:])]
        got = [unpacked(batch) for batch in shuffle.shuffled(parts, seed, 100, Path(folder) / "s")]
    keys = shuffle.keys_of(seed, 0, len(documents)).tolist()
    assert [document for part in got for document in part] == [documents[i] for i in np.argsort(keys)]


def batch_of(documents: list[list[list[int]]]) -> Batch:
    lengths = [len(sequence) for document in documents for sequence in document]
    tokens = [token for document in documents for sequence in document for token in sequence]
    counts = [len(document) for document in documents]
    return Batch(np.array(tokens, np.uint16), np.array(lengths, np.int32), np.array(counts, np.int32), None)


def unpacked(batch: Batch) -> list[list[list[int]]]:
    tokens, lengths = iter(batch.tokens.tolist()), iter(batch.lengths.tolist())
    return [[[next(tokens) for _ in range(next(lengths))] for _ in range(count)] for count in batch.counts.tolist()]


def test_texts_that_are_too_short_or_too_long_are_left_out(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", ["a", "abc", "abcdef", "abcdefghi"])
    run(tmp_path, "--min-chars 2 --max-chars 6")
    assert texts_of(tmp_path / "out_text_document") == ["abc", "abcdef"]
    manifest = json.loads((tmp_path / "out_text_document.manifest.json").read_bytes())
    assert manifest["filtered"] == {"longer than --max-chars 6": 1, "shorter than --min-chars 2": 1}


def test_bos_and_eod_stand_around_each_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByteLevelTokenizer, "special", lambda self, name: {"eod": 256, "bos": 255}.get(name))
    write_lines(tmp_path / "in.jsonl", ["ab", "", "c"])
    run(tmp_path, "--append-eod --prepend-bos")
    data = IndexedDataset(tmp_path / "out_text_document")
    assert [data[i].tolist() for i in range(2)] == [[255, 97, 98, 256], [255, 99, 256]]


def test_folders_patterns_and_compressions_are_read_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zstandard = pytest.importorskip("zstandard")
    folder = tmp_path / "many"
    (folder / "deep").mkdir(parents=True)
    write_lines(folder / "a.jsonl", ["1", "2"])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "3"}\n'))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "4"}\n'))
    (folder / "deep" / "d.txt").write_text("5\n\n6\n")
    (folder / "notes.md").write_text("not input")
    write_lines(folder / ".hidden.jsonl", ["hidden"])
    (folder / ".git").mkdir()
    write_lines(folder / ".git" / "e.jsonl", ["hidden"])
    run(tmp_path, "--workers 2", inputs="many")
    assert "tell no text: 1 (" in capsys.readouterr().out
    assert texts_of(tmp_path / "out_text_document") == ["1", "2", "3", "4", "5", "6"]
    run(tmp_path, "--overwrite", inputs="many/*.jsonl*")
    assert texts_of(tmp_path / "out_text_document") == ["1", "2", "3", "4"]
    with pytest.raises(DataError, match=r"pattern .* holds no input"):
        run(tmp_path, inputs="many/*.md")
    with pytest.raises(DataError, match=r"names .* twice"):
        run(tmp_path, inputs="many many/a.jsonl")


def test_endings_in_capitals_are_endings(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "A.JSONL.GZ").write_bytes(gzip.compress(b'{"text": "1"}\n'))
    (folder / "b.Txt").write_text("2")
    run(tmp_path, inputs="many")
    assert texts_of(tmp_path / "out_text_document") == ["1", "2"]


def test_standard_input_is_json_lines(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", ["from a pipe"] * 3)
    command = [
        sys.executable,
        "-m",
        "megalm.cli",
        "preprocess",
        "--input",
        "-",
        "--output-prefix",
        "out",
        *BYTES.split(),
    ]
    with open(tmp_path / "in.jsonl", "rb") as stream:
        subprocess.run(command, stdin=stream, cwd=tmp_path, check=True, timeout=60)
    assert texts_of(tmp_path / "out_text_document") == ["from a pipe"] * 3


def test_a_line_number_counts_over_units_and_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 64)
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 200)
    lines = ['{"text": "good"}'] * 300
    for number in (17, 123, 300):
        lines[number - 1] = "bad"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    run(tmp_path, "--on-error report --workers 2", inputs="a.jsonl b.jsonl.gz")
    listed = [line.split(": ")[0].rsplit("/", 1)[1] for line in (tmp_path / "out.rejected").read_text().splitlines()]
    assert listed == [f"{name}:{line}" for name in ("a.jsonl", "b.jsonl.gz") for line in (17, 123, 300)]


def test_a_shard_is_used_again_only_for_what_it_was_made_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 500)
    lines = [json.dumps({"text": f"text {i}"}) for i in range(100)]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, "bad"]))
    with pytest.raises(DataError, match=r"in\.jsonl:101: invalid JSON"):
        run(tmp_path)
    kept = len(list((tmp_path / "out.parts").glob("*.shard")))
    assert kept >= 3
    done: list[int] = []
    real = running.process_unit
    monkeypatch.setattr(running, "process_unit", lambda *a, **k: done.append(1) or real(*a, **k))
    options = preprocess.options_of(parsed(tmp_path, "--on-error skip"))
    preprocess.preprocess(options, Inline(), 1)  # type: ignore[arg-type]
    assert len(done) == 1
    assert texts_of(tmp_path / "out_text_document") == [f"text {i}" for i in range(100)]


def test_a_run_that_is_complete_is_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "in.jsonl", ["one"])
    run(tmp_path)
    made = (tmp_path / "out_text_document.bin").stat().st_mtime_ns
    run(tmp_path)
    assert "complete already" in capsys.readouterr().out
    assert (tmp_path / "out_text_document.bin").stat().st_mtime_ns == made
    with pytest.raises(DataError, match="exist already"):
        run(tmp_path, "--append-eod")


def test_a_terminal_shows_a_bar_that_is_rewritten() -> None:
    screen = Terminal()
    progress = Progress(1000, every_documents=10, stream=screen)
    for done in (10, 50):
        progress.update(input_bytes=done * 10, text_bytes=done * 8, documents=done, tokens=done * 4)
    progress.close()
    first, second = screen.getvalue().split("\r")[1:]
    assert first.startswith("[##..................] 10.0% | 10 documents | 40 tokens | ")
    assert second.startswith("[##########..........] 50.0% | 50 documents | 200 tokens | ")
    assert second.endswith("\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("ids", "dtype"), [(65498, np.uint16), (65499, np.int32), (2**31 - 1, np.int32)])
def test_the_vocabulary_decides_the_dtype_at_its_limits(tmp_path: Path, ids: int, dtype: Any) -> None:
    write_lines(tmp_path / "in.jsonl", [f"0 {ids - 1}"])
    run(tmp_path, "--append-eod", tokenizer=f"--tokenizer-type NullTokenizer --tokenizer-vocab-size {ids}")
    data = IndexedDataset(tmp_path / "out_text_document")  # the end of document is one id more
    assert data.dtype == dtype
    assert data[0].tolist() == [0, ids - 1, ids]
