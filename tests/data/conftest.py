"""Small datasets to read and the peer implementation to compare with."""

import importlib
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalm.data.indexed.reader import IndexedDataset
from megalm.data.indexed.writer import IndexedDatasetBuilder


@pytest.fixture(scope="session")
def write_dataset() -> Callable[..., Path]:
    """Writes a dataset of one-sequence documents; token t of the whole file is t % vocab_size."""

    def write(prefix: Path, lengths: Sequence[int], dtype: str = "uint16", vocab_size: int = 1000) -> Path:
        tokens = np.arange(sum(lengths), dtype=np.int64) % vocab_size
        with IndexedDatasetBuilder(prefix, dtype) as builder:
            builder.add_documents(tokens, np.asarray(lengths, dtype=np.int32))
            builder.finalize()
        return prefix

    return write


@pytest.fixture
def make_dataset(tmp_path: Path, write_dataset: Callable[..., Path]) -> Callable[..., IndexedDataset]:
    """Writes and opens a dataset with documents of the given lengths."""

    def make(lengths: Sequence[int], name: str = "data", **options: Any) -> IndexedDataset:
        return IndexedDataset(write_dataset(tmp_path / name, lengths, **options))

    return make


@pytest.fixture(scope="session")
def megatron() -> types.SimpleNamespace:
    """The modules of megatron-core's datasets (pip, CPU wheel, C++ helpers included)."""
    modules = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("gpt_dataset", "indexed_dataset", "helpers", "blended_megatron_dataset_config", "utils"):
            modules[name] = importlib.import_module(f"megatron.core.datasets.{name}")
    return types.SimpleNamespace(**modules)
