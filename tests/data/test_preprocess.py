"""`megalm preprocess`: the same bytes for every number of workers, and nothing half written."""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megalm.config.data import TokenizerConfig
from megalm.data import encode, preprocess, readers
from megalm.data.indexed import IndexedDataset
from megalm.data.manifest import check_tokenizer
from megalm.data.progress import Progress
from megalm.data.tokenizers import ByteLevelTokenizer
from megalm.errors import ConfigError, DataError, PlatformError

BYTES = "--tokenizer-type ByteLevelTokenizer"


def run(tmp_path: Path, flags: str = "", inputs: str = "in.jsonl", tokenizer: str = BYTES) -> int:
    parser = argparse.ArgumentParser()
    preprocess.add_arguments(parser)
    files = [str(tmp_path / name) for name in inputs.split()]
    prefix = ["--output-prefix", str(tmp_path / "out")]
    return preprocess.run(parser.parse_args(["--input", *files, *prefix, *tokenizer.split(), *flags.split()]))


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
    assert data.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert data.sequence_lengths.min() > 0


def test_output_does_not_depend_on_the_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 300)
    write_lines(tmp_path / "in.jsonl", [f"document {i} " * (i % 17) for i in range(500)])
    written = []
    for workers in (1, 2, 5):
        run(tmp_path, f"--workers {workers} --overwrite --json-keys text title")
        written.append({name: (tmp_path / name).read_bytes() for name in outputs(tmp_path)})
    assert written[0] == written[1] == written[2]
    assert len(written[0]) == 6
    assert len(IndexedDataset(tmp_path / "out_title_document")) == 500 - 30  # every 17th text is empty


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
    for kind in ("bin", "idx"):
        stored = (tmp_path / f"out_text_document.{kind}").read_bytes()
        assert manifest[kind] == {"bytes": len(stored), "sha256": hashlib.sha256(stored).hexdigest()}
    check_tokenizer(str(tmp_path / "out_text_document"), ByteLevelTokenizer().identity)
    with pytest.raises(DataError, match="made with tokenizer"):
        check_tokenizer(str(tmp_path / "out_text_document"), "0" * 64)
    summary = capsys.readouterr().out
    assert "2 documents, 10 tokens" in summary
    assert "train with --data-path" in summary


def test_a_bad_line_ends_the_run_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "good"}\n{"txt": "bad"}\n{bad}\n')
    with pytest.raises(DataError, match=r'in\.jsonl:2: missing key: "text" is not among txt.*--on-error skip'):
        run(tmp_path)
    assert outputs(tmp_path) == []


def test_bad_lines_can_be_left_out_and_are_counted_and_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "good"}\n{"text": 1}\n{bad}\n{}\nx\n{"text": "also good"}\n')
    run(tmp_path, f"--on-error skip --reject-file {tmp_path}/rejected.txt")
    assert texts_of(tmp_path / "out_text_document") == ["good", "also good"]
    summary = capsys.readouterr().out
    assert "2 lines rejected: invalid JSON" in summary
    assert "1 lines rejected: missing key" in summary
    listed = (tmp_path / "rejected.txt").read_text().splitlines()
    assert [line.split(":")[1] for line in listed] == ["2", "3", "4", "5"]
    manifest = json.loads((tmp_path / "out_text_document.manifest.json").read_bytes())
    assert manifest["rejected"] == {"invalid JSON": 2, "missing key": 1, "not a string": 1}


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n', "{}\n"])
def test_nothing_left_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"would be empty: . documents were read"):
        run(tmp_path, "--on-error skip")
    assert outputs(tmp_path) == []


def test_existing_output_is_kept_without_overwrite(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", ["one"])
    run(tmp_path)
    write_lines(tmp_path / "in.jsonl", ["two"])
    with pytest.raises(DataError, match=r"exist already; give --overwrite"):
        run(tmp_path)
    assert texts_of(tmp_path / "out_text_document") == ["one"]
    run(tmp_path, "--overwrite")
    assert texts_of(tmp_path / "out_text_document") == ["two"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--workers 0", "--workers 0 must be 1 or more"),
        ("--log-interval 0", "--log-interval 0 must be 1 or more"),
        ("--reject-file x", "add --on-error skip"),
        ("--json-keys a b a", "names a twice"),
        ("--tokenizer-type HFTokenzer", '--tokenizer-type HFTokenzer.*did you mean "HFTokenizer"'),
    ],
)
def test_flags_that_make_no_sense_are_refused(tmp_path: Path, flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, flags)


def test_append_eod_needs_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "in.jsonl", ["one"])
    monkeypatch.setattr(ByteLevelTokenizer, "eod", None)
    with pytest.raises(DataError, match="--append-eod needs a tokenizer with an end-of-document token"):
        run(tmp_path, "--append-eod")


def test_a_worker_that_dies_is_an_error_not_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "in.jsonl", ["one"])
    monkeypatch.setattr(preprocess, "encode_chunk", die)
    with pytest.raises(PlatformError, match=r"a worker process died.*Nothing was published"):
        run(tmp_path, "--workers 2")
    assert outputs(tmp_path) == []


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_chunks_under_way_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "encode_chunk", lambda encoding, chunk: chunk)
    taken = 0

    def endless() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield readers.Chunk("f.jsonl", taken, b'{"text": "x"}\n')

    encoding = encode.Encoding(TokenizerConfig(tokenizer_type="ByteLevelTokenizer"), ("text",), False, "uint16")
    results = preprocess._in_order(Inline(), encoding, endless(), 6)  # type: ignore[arg-type]
    for done in range(1, 50):
        next(results)
        assert taken - done <= 6


class Inline:
    """An executor that does the work at once."""

    def submit(self, function: Any, *arguments: Any) -> Any:
        from concurrent.futures import Future

        future: Future[Any] = Future()
        future.set_result(arguments[1])
        return future


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", ["x" * 1000] * 300)
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert "DataError: cannot write" in done.stderr
    assert "nothing was published" in done.stderr
    assert outputs(tmp_path) == []


START = """
import sys, resource, signal
from megalm.config.data import TokenizerConfig
from megalm.data.preprocess import PreprocessOptions, preprocess
folder = sys.argv[1]
options = PreprocessOptions(inputs=(folder + "/in.jsonl",), output_prefix=folder + "/out", workers=2,
    tokenizer=TokenizerConfig(tokenizer_type="ByteLevelTokenizer"), log_interval=1)
"""
LIMITED = START + "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\npreprocess(options)\n"


def test_a_killed_run_leaves_no_final_name_no_worker_and_can_be_repeated(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "in.jsonl")
    process = subprocess.Popen([sys.executable, "-c", START + "preprocess(options)", str(tmp_path)])
    with open(tmp_path / "in.jsonl", "wb", buffering=0) as pipe:
        pipe.write(b'{"text": "x"}\n' * 150_000)  # more than one chunk, so that the workers have started
        workers = children(process.pid)
        (tmp_path / "other.jsonl").write_text('{"text": "x"}\n')
        with pytest.raises(DataError, match="being written by another process"):
            run(tmp_path, inputs="other.jsonl")
        process.kill()
        process.wait()
    assert len(workers) == 2
    assert all(name.endswith(".partial") for name in outputs(tmp_path))
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    (tmp_path / "in.jsonl").unlink()
    write_lines(tmp_path / "in.jsonl", ["again"])
    run(tmp_path)
    assert texts_of(tmp_path / "out_text_document") == ["again"]
    assert not [name for name in outputs(tmp_path) if name.endswith(".partial")]


def children(pid: int) -> list[int]:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
        if len(found) == 2:
            return found
        time.sleep(0.02)
    return []


def test_progress_lines_tell_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(1000, every_documents=10)
    for done in range(1, 31):
        progress.update(input_bytes=done * 10, text_bytes=done * 8, documents=done, tokens=done * 4)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[1].startswith(" 20.0% | 20 documents | 80 tokens | ")
    assert lines[1].endswith("s left")
