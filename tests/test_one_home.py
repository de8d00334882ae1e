"""Rules that have one home: nothing in the package goes around them."""

import re
from pathlib import Path

import pytest

import megalm

ROOT = Path(megalm.__file__).parent


@pytest.mark.parametrize(
    ("pattern", "homes"),
    [
        # pickles can run code; those of published weights are read as tensors alone, where the user allows it
        (
            r"torch\.load\b|\bimport pickle|(all_gather|gather|broadcast|scatter)_object|allow_pickle=True",
            {"checkpoint/hugging_face/pickled.py"},
        ),
        # the system's refusals are put into words in one place; two sinks hand an error on under another name
        (r"(?<!os)\.strerror\b", {"monitor/sinks/jsonl.py", "monitor/sinks/tensorboard.py"}),
        (r"os\.strerror", {"storage/faults.py", "data/text/input_file.py"}),
        # files of strangers are parsed where depth, size and repeats are bounded
        (r"yaml\.(safe_)?load\b|SafeLoader\b", {"storage/documents.py"}),
        # names of temporary files and locks are opened where links are not followed
        (r"mkstemp|O_CREAT", {"storage/durable.py"}),
    ],
)
def test_it_is_done_at_home_only(pattern: str, homes: set[str]) -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if path.relative_to(ROOT).parts[0] != "testing" and re.search(pattern, path.read_text(encoding="utf-8"))
    }
    assert found == homes
