"""Rows of `megalm doctor` that must say what a run would do."""

import pytest

from megalm.doctor.machine import kernels
from megalm.kernels.building import library
from megalm.kernels.building.library import Library


def test_the_kernels_are_those_of_a_run() -> None:
    row = next(iter(kernels()))
    assert (row.name, row.text) == ("kernels", library.load("auto").reason)


def test_kernels_that_cannot_be_had_are_a_warning_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda *_: Library(None, "torch reference: there is no C++ compiler"))
    row = next(iter(kernels()))
    assert row.mark == "warn"
    assert "no C++ compiler" in row.text
