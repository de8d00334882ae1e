"""docs/parallelism.md shows the table of layouts as it is."""

from pathlib import Path

from layouts import CI, ROWS, summary

PAGE = Path(__file__).resolve().parents[2] / "docs" / "parallelism.md"


def test_the_page_shows_the_table() -> None:
    shown = PAGE.read_text().partition("<!-- layouts.summary() -->\n")[2].partition("<!-- end -->")[0]
    assert shown == summary()


def test_rows_are_different_and_some_always_run() -> None:
    assert len({str(row) for row in ROWS}) == len(ROWS)
    assert 20 <= sum(row.ci == CI for row in ROWS) < len(ROWS)
