"""`megalm show-sample`: the pictures of docs/objectives.md are what it prints; runs, pages, and what is refused."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from megalm.cli import main
from megalm.objectives.table import Words, tables, visible

PAGE = Path(__file__).resolve().parents[2] / "docs" / "objectives.md"
BLOCKS = re.findall(r"```bash\nmegalm (show-sample [^\n]*)\n```\n\n```text\n(.*?)```", PAGE.read_text(), re.DOTALL)
BYTES = "--tokenizer-type ByteLevelTokenizer --vocab-extra-ids 20"


@pytest.mark.parametrize(("command", "picture"), BLOCKS, ids=lambda word: word[:40])
def test_the_pictures_of_the_page_are_what_is_printed(command, picture, capsys):
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out == picture


def test_every_objective_has_a_picture():
    from megalm.config.rules.objective import FAMILY_OF

    shown = {name for command, _ in BLOCKS for name in re.findall(r"--objective (\w+)", command)} | {"causal"}
    assert shown == set(FAMILY_OF)
    assert any("--objective-mixture" in command for command, _ in BLOCKS)


def test_a_page_escapes_what_it_shows(tmp_path, capsys):
    page = tmp_path / "page.html"
    words = ["show-sample", *BYTES.split(), "--seq-length", "8", "--text", "<b>&", "--html", str(page)]
    assert main(words) == 0
    assert capsys.readouterr().out == f"wrote {page}\n"
    text = page.read_text()
    assert "<td>&lt;</td>" in text
    assert "<b>" not in text
    assert main([*words[:-1], str(tmp_path / "missing" / "page.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_mock_data_of_a_run_are_shown_from_any_number(capsys):
    words = f"show-sample --mock-data --seq-length 6 --train-iters 4 {BYTES}".split()
    assert main([*words, "--first", "2", "--samples", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("position") == 2
    assert out.startswith("sample 2, causal\n")
    assert main([*words, "--first", "2", "--samples", "5"]) != 0
    assert "samples 2 .. 6 of the train set are wanted, and it has 4" in capsys.readouterr().err
    assert main([*words[:-4], "--vocab-size", "90", "--text", "x"]) == 2
    assert "--text needs a tokenizer" in capsys.readouterr().err


def test_documents_prefixes_and_padding_are_seen_as_models_do():
    row = {
        "tokens": np.array([5, 6, 0, 7, 8, 9]),
        "cu_seqlens": np.array([0, 3, 6, 6, 6, 6, 6], dtype=np.int32),
        "prefix_lengths": np.array([2, 0, 0, 0, 0, 0], dtype=np.int32),
    }
    assert visible(row, causal=True).astype(int).tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]
    (table,) = tables({"tokens": np.arange(120)}, Words(None, {}), causal=True, title="long")
    assert [line[-1] for line in table.rows[1:3]] == ["▒" + "·" * 39, "█" + "·" * 39]
