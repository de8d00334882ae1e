"""What `megalm preprocess` says and leaves when input, flags, tokenizer, disk or a worker fail it."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from test_preprocess import BYTES, Inline, outputs, parsed, run, texts_of, write_lines

from megalm.cli import main
from megalm.data import preprocess
from megalm.data.indexed.reader import IndexedDataset
from megalm.data.preprocess import pipeline as running
from megalm.data.tokenizers import ByteLevelTokenizer, NullTokenizer
from megalm.data.tokenizers.encode import WrongIdsError
from megalm.errors import ConfigError, DataError, PlatformError


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
    assert "2 documents rejected: invalid JSON" in summary
    assert "1 documents rejected: missing key" in summary
    listed = (tmp_path / "rejected.txt").read_text().splitlines()
    assert [line.split(":")[1] for line in listed] == ["2", "3", "4", "5"]
    manifest = json.loads((tmp_path / "out_text_document.manifest.json").read_bytes())
    assert manifest["rejected"] == {"invalid JSON": 2, "missing key": 1, "not a string": 1}


def test_input_of_nothing_but_bad_lines_is_listed_in_bounded_memory(tmp_path: Path) -> None:
    """One unit of faults is written down as they are found: a list of them would take hundreds of bytes each."""
    (tmp_path / "in.jsonl").write_text("x\n" * 25_000 + '{"text": "good"}\n')
    tracemalloc.start()
    try:
        preprocess.preprocess(preprocess.options_of(parsed(tmp_path, "--on-error report")), Inline(), 1)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    rejected = (tmp_path / "out.rejected").read_text().splitlines()
    assert len(rejected) == 25_000
    assert rejected[-1].startswith(f"{tmp_path}/in.jsonl:25000: invalid JSON")
    assert texts_of(tmp_path / "out_text_document") == ["good"]


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n', "{}\n", '{"text": "short"}\n'])
def test_nothing_left_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"would be empty: . documents were read"):
        run(tmp_path, "--on-error skip --min-chars 6")
    assert outputs(tmp_path) == []


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "cut.jsonl.zst", "cut.parquet"])
def test_of_input_that_is_cut_off_nothing_is_published(tmp_path: Path, name: str) -> None:
    write_lines(tmp_path / "in.jsonl", [f"whole {number}" for number in range(100)])
    lines = (tmp_path / "in.jsonl").read_bytes()
    if name.endswith("parquet"):
        table = pytest.importorskip("pyarrow").table({"text": [f"row {number}" for number in range(1000)]})
        pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / name)
    else:
        compress = gzip.compress if name.endswith("gz") else pytest.importorskip("zstandard").compress
        (tmp_path / name).write_bytes(compress(lines))
    os.truncate(tmp_path / name, (tmp_path / name).stat().st_size - 9)
    with pytest.raises(DataError, match=rf"{name} is damaged or cut off: .*; copy it again"):
        run(tmp_path, "--on-error skip --workers 2", f"in.jsonl {name}")
    assert [left for left in outputs(tmp_path) if left != "out.parts"] == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--reject-file x", "add --on-error report"),
        ("--json-keys a b a", "names a twice"),
        ("--min-chars 5 --max-chars 4", "--min-chars 5 is more than --max-chars 4"),
        ("--keep-newlines", "add --split-sentences"),
        ("--tokenizer-type HFTokenzer", '--tokenizer-type HFTokenzer.*did you mean "HFTokenizer"'),
    ],
)
def test_flags_that_make_no_sense_are_refused(tmp_path: Path, flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--partitions 2 --ftfy", r"2 problems:\n  - --partitions is known elsewhere but not here; .*--workers"),
        ("--dataset-impl=mmap", "--dataset-impl is known elsewhere but not here; datasets are always memory-mapped"),
        ("--split-sentence", '--split-sentence is not known; did you mean "--split-sentences"'),
        ("--xyz 3", "--xyz is not known; see --help"),
        ("stray", "stray: not expected; see --help"),
    ],
)
def test_flags_of_other_programs_and_mistyped_ones_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    known = ["--input", "in.jsonl", "--output-prefix", str(tmp_path / "out"), "--append-eod"]
    assert main(["preprocess", *known, *flags.split()]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_append_eod_needs_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "in.jsonl", ["one"])
    monkeypatch.setattr(ByteLevelTokenizer, "special", lambda self, name: None)
    with pytest.raises(DataError, match="--append-eod needs a tokenizer with an end-of-document token"):
        run(tmp_path, "--append-eod")


def test_a_worker_that_dies_is_an_error_not_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "in.jsonl", ["one"])
    monkeypatch.setattr(running, "process_unit", die)
    with pytest.raises(PlatformError, match=r"a worker process died.*Nothing was published"):
        run(tmp_path, "--workers 2")
    assert outputs(tmp_path) == []


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", ["x" * 1000] * 300)
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert "error: cannot write" in done.stderr
    assert "nothing was published" in done.stderr
    assert outputs(tmp_path) == []


START = """
import sys, resource, signal
from megalm.cli import main
folder = sys.argv[1]
command = ["preprocess", "--input", folder + "/in.jsonl", "--output-prefix", folder + "/out", "--workers", "2",
    "--tokenizer-type", "ByteLevelTokenizer", "--log-interval", "1"]
"""


LIMITED = START + "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\nsys.exit(main(command))\n"


def test_a_killed_run_leaves_no_final_name_no_worker_and_can_be_repeated(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "in.jsonl")
    process = subprocess.Popen([sys.executable, "-c", START + "main(command)", str(tmp_path)])
    with open(tmp_path / "in.jsonl", "wb", buffering=0) as pipe:
        pipe.write(b'{"text": "x"}\n' * 400_000)  # more than one unit, so that the workers have started
        workers = children(process.pid)
        (tmp_path / "other.jsonl").write_text('{"text": "x"}\n')
        with pytest.raises(DataError, match="being written by another process"):
            run(tmp_path, inputs="other.jsonl")
        process.kill()
        process.wait()
    assert len(workers) == 2
    assert outputs(tmp_path) == ["out.parts"]
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    (tmp_path / "in.jsonl").unlink()
    write_lines(tmp_path / "in.jsonl", ["again"])
    run(tmp_path)
    assert texts_of(tmp_path / "out_text_document") == ["again"]
    assert outputs(tmp_path) == [f"out_text_document.{end}" for end in ("bin", "idx", "manifest.json")]


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


def test_words_that_are_no_ids_are_named_with_their_line(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", ["1 2", "3 x", "4 10"])
    null = "--tokenizer-type NullTokenizer --tokenizer-vocab-size 10"
    with pytest.raises(DataError, match=r"in\.jsonl:2: cannot be encoded: .*'x' is not an id in 0 \.\. 10"):
        run(tmp_path, tokenizer=null)
    run(tmp_path, "--on-error report", tokenizer=null)
    data = IndexedDataset(tmp_path / "out_text_document")
    assert [data[i].tolist() for i in range(len(data))] == [[1, 2], [4, 10]]
    assert "in.jsonl:2: cannot be encoded" in (tmp_path / "out.rejected").read_text()


class _Panic(BaseException):
    """What a library in Rust raises."""


@pytest.mark.parametrize("error", [ValueError("no <unk>"), _Panic("index out of bounds"), DataError("no id")])
def test_what_a_tokenizer_refuses_has_its_line_and_can_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    def encode(self: ByteLevelTokenizer, text: str) -> list[int]:
        if "bad" in text:
            raise error
        return list(text.encode())

    monkeypatch.setattr(ByteLevelTokenizer, "encode", encode)
    write_lines(tmp_path / "in.jsonl", ["one", "bad one", "two", "bad two"])
    with pytest.raises(DataError, match=rf"in\.jsonl:2: cannot be encoded: {error}; correct .* --on-error"):
        run(tmp_path)
    assert outputs(tmp_path) == []
    run(tmp_path, "--on-error report --clean")
    assert texts_of(tmp_path / "out_text_document") == ["one", "two"]
    assert (tmp_path / "out.rejected").read_text().count("cannot be encoded") == 2
    assert "2 documents rejected: cannot be encoded" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["9" * 5000, "0" * 4999 + "11", "\u0663", "-1", "1.0"])
def test_no_word_is_too_odd_to_be_no_id(word: str) -> None:
    with pytest.raises(DataError, match="is not an id"):
        NullTokenizer(10).encode(f"1 {word}")
    assert NullTokenizer(10).encode("0" * 5000 + "7") == [7]


def test_other_ids_of_the_fast_encoder_end_the_run_and_its_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: Any) -> Any:
        raise WrongIdsError("the fast encoder gives other ids")

    write_lines(tmp_path / "in.jsonl", ["one", "two"])
    (tmp_path / "out.parts").mkdir()
    (tmp_path / "out.parts" / "of_before.shard").write_bytes(b"x")
    monkeypatch.setattr(ByteLevelTokenizer, "encode", wrong)
    with pytest.raises(WrongIdsError, match="other ids"):
        run(tmp_path, "--on-error skip")
    assert not (tmp_path / "out.parts").exists()


def test_texts_that_the_vocabulary_lacks_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def encode(self: ByteLevelTokenizer, text: str) -> list[int]:
        return [ord(char) if char.isascii() else 1 for char in text]

    monkeypatch.setattr(ByteLevelTokenizer, "encode", encode)
    monkeypatch.setattr(ByteLevelTokenizer, "special", lambda self, name: {"unk": 1, "eod": 256}.get(name))
    write_lines(tmp_path / "in.jsonl", ["plain", "\u65e5\u672c", "", "caf\u00e9", " \u672c "])
    run(tmp_path)
    told = capsys.readouterr().out
    assert "3 x texts with <unk> for what the vocabulary lacks" in told
    assert "2 x texts that are nothing but <unk>" in told


def test_two_columns_of_one_name_are_named(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = [arrow.array(["a"]), arrow.array(["b"])]
    parquet.write_table(arrow.Table.from_arrays(columns, ["text", "text"]), tmp_path / "in.parquet")
    with pytest.raises(DataError, match=r"in\.parquet has 2 columns named text"):
        run(tmp_path, inputs="in.parquet")


def test_a_very_long_line_is_rejected_and_the_lines_around_it_are_not(tmp_path: Path) -> None:
    with open(tmp_path / "in.jsonl", "wb") as stream:
        stream.write(b'{"text": "before"}\n{"text": "')
        stream.writelines(b"x" * (1 << 20) for _ in range(9))
        stream.write(b'"}\n{"text": "after"}\n')
    run(tmp_path, "--on-error report --max-line-mb 2 --workers 2")
    assert texts_of(tmp_path / "out_text_document") == ["before", "after"]
    assert "in.jsonl:2: line too long: more than 2,097,152 bytes" in (tmp_path / "out.rejected").read_text()


@pytest.mark.long
def test_a_line_of_a_gigabyte_takes_little_memory(tmp_path: Path) -> None:
    with open(tmp_path / "in.jsonl", "wb") as stream:
        stream.write(b'{"text": "before"}\n')
        stream.seek(1 << 30, os.SEEK_CUR)  # a hole, read as zeros
        stream.write(b'\n{"text": "after"}\n')
    command = [sys.executable, "-m", "megalm.cli", "preprocess", "--input", str(tmp_path / "in.jsonl")]
    output = ["--output-prefix", str(tmp_path / "out"), "--on-error", "report", "--workers", "2"]
    limited = ["bash", "-c", 'ulimit -d 900000 && exec "$@"', "-"]  # KiB of each process: less than the line
    subprocess.run([*limited, *command, *output, *BYTES.split()], check=True, stdout=subprocess.DEVNULL, timeout=120)
    assert texts_of(tmp_path / "out_text_document") == ["before", "after"]
    assert "in.jsonl:2: line too long" in (tmp_path / "out.rejected").read_text()


def test_what_was_no_unicode_is_counted(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "a\xff"}\n{"text": "\\ud800"}\n{"text": "b"}\n')
    run(tmp_path, "--clean")
    manifest = json.loads((tmp_path / "out_text_document.manifest.json").read_bytes())
    assert manifest["changed"] == {"no Unicode, now U+FFFD": 2}


def test_an_id_outside_the_vocabulary_is_named_with_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByteLevelTokenizer, "vocab_size", 120)
    write_lines(tmp_path / "in.jsonl", ["abc", "wxyz"])
    with pytest.raises(DataError, match=r"gave id 120, outside its vocabulary of 120, in 'wxyz'"):
        run(tmp_path)
    assert outputs(tmp_path) == []


def test_a_tokenizer_that_begins_texts_itself_does_not_get_a_second_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as if its encoding of "a" began with it
    monkeypatch.setattr(ByteLevelTokenizer, "special", lambda self, name: ord("a") if name == "bos" else None)
    write_lines(tmp_path / "in.jsonl", ["x"])
    with pytest.raises(DataError, match="there would be two"):
        run(tmp_path, "--prepend-bos")


def test_a_key_that_is_no_part_of_a_file_name_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", ["x"])
    with pytest.raises(ConfigError, match='must not be empty or hold a "/"'):
        run(tmp_path, "--json-keys a/b")


def test_what_the_disk_says_between_the_phases_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "in.jsonl", ["x"])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", f"{tmp_path}/out.parts/publishing")

    with monkeypatch.context() as patched:
        patched.setattr(running, "replace_text", full)
        with pytest.raises(
            DataError, match=r"cannot write .*out\.parts/publishing: No space.*the same command goes on"
        ):
            run(tmp_path)
    assert not [name for name in outputs(tmp_path) if name.endswith((".bin", ".idx", ".json"))]
    run(tmp_path)
    assert texts_of(tmp_path / "out_text_document") == ["x"]
