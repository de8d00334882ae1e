"""`megalm corpus` and `megalm train-tokenizer`: the same output for the same input, and lossless ids."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from megalm.config.data import TokenizerConfig
from megalm.data.tokenizers import build_tokenizer
from megalm.data.tools import corpus, train_tokenizer
from megalm.errors import DataError


def run(command: Any, *flags: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return int(command.run(parser.parse_args([str(flag) for flag in flags])))


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real corpus of 1 MB."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    assert run(corpus, "--output", path, "--size-mb", 1) == 0
    return path


def records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_corpus_is_prose_and_source_without_absolute_paths(text_file: Path) -> None:
    documents = records(text_file)
    assert 900_000 < text_file.stat().st_size <= 1_000_000
    sources = [document["source"] for document in documents]
    assert len(set(sources)) == len(sources) > 200
    assert all(set(document) == {"text", "source"} and document["text"].strip() for document in documents)
    assert not any(source.startswith("/") or "site-packages" in source or "/tests/" in source for source in sources)
    topics = [document for document in documents if document["source"].endswith(":topic")]
    assert len(topics) > 50
    assert "argparse.py:docstrings" in sources


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of a few files."""
    folder = tmp_path / "lib"
    for name, text in {
        "a.py": '"""A."""\nx = 1\n', "pack/b.py": "y = 2\n", "test/test_a.py": '"""T."""\n', "pack/empty.py": "",
        "site-packages/c.py": "no\n", "_sysconfigdata_x.py": "no\n", "lib-dynload/d.py": "no\n", "latin.py": "é\n",
        "encodings/cp1.py": "no\n",
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="latin-1")
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(folder))
    return folder


def test_prose_comes_first_and_tests_last_and_build_files_are_left_out(library: Path) -> None:
    found = [(source, text) for source, text in corpus.documents(library) if not source.endswith(":topic")]
    assert found == [
        ("a.py:docstrings", "A.\n\n"), ("a.py", '"""A."""\nx = 1\n'), ("pack/b.py", "y = 2\n"),
        ("test/test_a.py", '"""T."""\n'),
    ]  # fmt: skip


def test_documents_of_one_module_stand_together_in_the_file(library: Path, tmp_path: Path) -> None:
    run(corpus, "--output", tmp_path / "c.jsonl")
    sources = [record["source"] for record in records(tmp_path / "c.jsonl")]
    assert sources.index("a.py:docstrings") == sources.index("a.py") + 1
    assert sources != sorted(sources)


def test_the_same_request_is_up_to_date_and_another_one_is_not(
    library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "c.jsonl", tmp_path / "d.jsonl"
    for path in (first, second):
        run(corpus, "--output", path)
    content = first.read_bytes()
    assert second.read_bytes() == content
    capsys.readouterr()
    run(corpus, "--output", first)
    assert capsys.readouterr().out == f"{first} is up to date\n"
    first.write_bytes(content[:-1])
    run(corpus, "--output", first)
    assert first.read_bytes() == content
    run(corpus, "--output", first, "--size-mb", 0.1)
    assert 0 < first.stat().st_size <= 100_000


def test_a_size_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    for size in (0, 0.0001):
        with pytest.raises(DataError, match="--size-mb"):
            run(corpus, "--output", tmp_path / "c.jsonl", "--size-mb", size)
    assert list(tmp_path.iterdir()) == []


def test_docstrings_of_module_class_and_function_are_taken() -> None:
    source = (
        '"""Module."""\nclass A:\n    """Class.\n\n    More."""\n    def f(self):\n        "Function."\ndef g(): pass\n'
    )
    assert corpus.docstrings(source) == "Module.\n\nClass.\n\nMore.\n\nFunction.\n\n"
    assert corpus.docstrings("x = 1") == corpus.docstrings("not python (") == ""


@pytest.mark.parametrize("model_type", ["bpe", pytest.param("unigram", marks=pytest.mark.long)])
def test_a_trained_tokenizer_is_lossless_on_python_source(text_file: Path, tmp_path: Path, model_type: str) -> None:
    options = ("--input", text_file, "--output-prefix", tmp_path / "t", "--vocab-size", 1000)
    assert run(train_tokenizer, *options, "--model-type", model_type) == 0
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=str(tmp_path / "t.model")))
    assert (tokenizer.vocab_size, tokenizer.special("eod")) == (1000, 2)
    texts = [document["text"] for document in records(text_file)][::5]
    texts += ["\t\tx\r\n\n   y  \n", "日本語 🙂", " ", "\n", "", "<s></s>", "a\0b"]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts
    assert len(tokenizer.encode("        ")) <= 2, "runs of blanks are tokens"
    newline_ids = [tokenizer.encode(text) for text in ("):\n", "\n\n")]
    assert max(len(ids) for ids in newline_ids) <= 2, "line ends are tokens, not bytes"


def test_training_again_gives_the_same_bytes_and_is_skipped_when_up_to_date(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for prefix in ("a", "b"):
        run(train_tokenizer, "--input", text_file, "--output-prefix", tmp_path / prefix, "--vocab-size", 600)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    capsys.readouterr()
    run(train_tokenizer, "--input", text_file, "--output-prefix", tmp_path / "a", "--vocab-size", 600)
    assert "up to date" in capsys.readouterr().out
    run(train_tokenizer, "--input", text_file, "--output-prefix", tmp_path / "a", "--vocab-size", 700)
    assert "700 ids" in capsys.readouterr().out


@pytest.mark.parametrize(("size", "reason"), [(100, "smaller than required_chars"), (10**7, "too high")])
def test_a_vocabulary_that_does_not_fit_the_text_is_refused(
    text_file: Path, tmp_path: Path, size: int, reason: str
) -> None:
    with pytest.raises(DataError, match=f"--vocab-size {size} does not fit this text: .*{reason}"):
        run(train_tokenizer, "--input", text_file, "--output-prefix", tmp_path / "t", "--vocab-size", size)
    assert list(tmp_path.iterdir()) == []


def test_training_blocks_are_spread_over_the_texts_and_end_at_lines() -> None:
    texts = [f"{i} line\n" * 1000 for i in range(20)]
    whole = train_tokenizer.training_blocks(texts, 10**9)
    assert "".join(whole) == "".join(texts)
    assert all(block.endswith("\n") and len(block) <= train_tokenizer.BLOCK_BYTES for block in whole)
    some = train_tokenizer.training_blocks(texts, 40_000)
    assert 20_000 <= sum(map(len, some)) <= 40_000
    assert len({block.split()[0] for block in some}) >= 7
    once = train_tokenizer.training_blocks(iter(texts), 40_000)
    assert once == some == train_tokenizer.training_blocks(some, 40_000), "read once, and chosen once"
    assert "".join(train_tokenizer.training_blocks(["x" * 9000], 10**9)) == "x" * 9000


def test_input_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("")
    with pytest.raises(DataError, match="hold no text"):
        run(train_tokenizer, "--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "t")
    (tmp_path / "in.jsonl").write_text('{"txt": ""}\n')
    with pytest.raises(DataError, match=r"in\.jsonl:1: missing key"):
        run(train_tokenizer, "--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "t")
