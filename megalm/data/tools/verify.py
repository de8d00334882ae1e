"""`megalm verify`: reads every byte of an indexed dataset and says all that is wrong with it.

Checked: the header and sizes of both files, every length, offset and document boundary, the range of every id, and
what the manifest says (counts, dtype, SHA-256), where there is one. Memory does not grow with the dataset.
"""

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megalm.config.paths import path_argument
from megalm.config.ranges import Range
from megalm.data.indexed.manifest import manifest_path, read_manifest
from megalm.data.indexed.reader import IndexedDataset
from megalm.data.samples.build import open_dataset
from megalm.errors import DataError
from megalm.storage.durable import sha256_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `megalm verify`."""
    parser.description = "Check every byte of indexed datasets; the exit code is 0 only when all is well."
    parser.add_argument(
        "prefix",
        nargs="+",
        type=path_argument,
        metavar="PREFIX",
        help="PREFIX.bin, PREFIX.idx and PREFIX.manifest.json.",
    )
    parser.add_argument(
        "--vocab-size", type=Range(1), metavar="N", help="Number of ids (default: the manifest's; else only id >= 0)."
    )


def run(arguments: argparse.Namespace) -> int:
    """Verifies each dataset and prints a line for it.

    Raises:
        DataError: everything that is wrong, of all datasets.
    """
    problems = []
    for prefix in arguments.prefix:
        try:
            print(verify(prefix, arguments.vocab_size))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return 0


@dataclass(frozen=True)
class _Tokens:
    """What a pass over all tokens found."""

    smallest: int
    largest: int
    sha256: str
    first_bad: tuple[int, int] | None
    """Number in `.bin` and value of the first id out of range."""


def verify(prefix: str, vocab_size: int | None = None) -> str:
    """One line on the dataset `prefix`.

    Raises:
        DataError: everything that is wrong with it.
    """
    indexed = open_dataset(prefix)
    manifest = read_manifest(manifest_path(prefix))
    limit = vocab_size or ((manifest or {}).get("tokenizer") or {}).get("vocab_size")
    tokens = _read_all(indexed, limit)
    wrong = _range_problems(indexed, tokens, limit)
    if manifest is not None:
        wrong += _manifest_problems(indexed, manifest, tokens)
    if wrong:
        raise _damaged(prefix, wrong)
    found = f"{len(indexed.document_indices) - 1:,} documents, {indexed.num_tokens:,} tokens ({indexed.dtype.name})"
    ids = f"ids {tokens.smallest} .. {tokens.largest}" + (f" of {limit}" if limit else "")
    return f"{prefix}: ok, {found}, {ids}, " + ("manifest and hashes agree" if manifest else "no manifest")


def _read_all(indexed: IndexedDataset, vocab_size: int | None) -> _Tokens:
    digest, position = hashlib.sha256(), 0
    smallest, largest, first_bad = np.iinfo(np.int64).max, -1, None
    for block in indexed.blocks(0, len(indexed)):
        digest.update(block.data)
        low, high = int(block.min()), int(block.max())
        if first_bad is None and (low < 0 or (vocab_size is not None and high >= vocab_size)):
            outside = block < 0 if vocab_size is None else (block < 0) | (block >= vocab_size)
            number = int(np.argmax(outside))
            first_bad = position + number, int(block[number])
        smallest, largest, position = min(smallest, low), max(largest, high), position + len(block)
    return _Tokens(int(smallest), largest, digest.hexdigest(), first_bad)


def _range_problems(indexed: IndexedDataset, tokens: _Tokens, vocab_size: int | None) -> list[str]:
    if tokens.first_bad is None:
        return []
    position, value = tokens.first_bad
    byte = position * indexed.dtype.itemsize
    sequence = int(np.searchsorted(indexed.sequence_pointers, byte, side="right")) - 1
    offset = position - int(indexed.sequence_pointers[sequence]) // indexed.dtype.itemsize
    rule = f"0 .. {vocab_size - 1}" if vocab_size else "0 and up"
    return [f"token id {value} at position {offset} of sequence {sequence} is outside {rule}"]


def _manifest_problems(indexed: IndexedDataset, manifest: dict[str, Any], tokens: _Tokens) -> list[str]:
    bin_path, idx_path = Path(f"{indexed.prefix}.bin"), Path(f"{indexed.prefix}.idx")
    facts = {
        "documents": len(indexed.document_indices) - 1,
        "tokens": indexed.num_tokens,
        "dtype": indexed.dtype.name,
        "bin.bytes": bin_path.stat().st_size,
        "bin.sha256": tokens.sha256,
        "idx.bytes": idx_path.stat().st_size,
        "idx.sha256": sha256_of(idx_path),
    }
    stated = dict(_flat(manifest))
    if missing := [name for name in ("bin.sha256", "idx.sha256") if name not in stated]:
        return [f"its manifest does not say {' and '.join(missing)}"]
    return [
        f"{name} is {value}, the manifest says {stated[name]}"
        for name, value in facts.items()
        if name in stated and stated[name] != value
    ]


def _flat(manifest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in manifest.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", content) for inner, content in value.items())
        else:
            yield name, value


def _damaged(prefix: str, wrong: list[str]) -> DataError:
    return DataError(f"{prefix} is damaged: {'; '.join(wrong)}; copy its files again, or preprocess the text again")
