"""The workspace that the end-to-end tests share."""

import pytest
from launching import Workspace, run


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("workspace")
    corpus, tokenizer = folder / "corpus.jsonl", folder / "tokenizer"
    for command in (
        ("corpus", "--output", corpus, "--size-mb", "1"),
        ("train-tokenizer", "--input", corpus, "--output-prefix", tokenizer, "--vocab-size", "1000"),
        ("preprocess", "--input", corpus, "--output-prefix", folder / "corpus", "--append-eod", "--workers", "2",
         "--tokenizer-type", "GPTSentencePieceTokenizer", "--tokenizer-model", f"{tokenizer}.model"),
    ):  # fmt: skip
        done = run("megalm", *command)
        assert done.code == 0, done.output
    return Workspace(folder)
