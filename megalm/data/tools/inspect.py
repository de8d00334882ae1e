"""`megalm inspect`: what an indexed dataset holds, with the lengths of its documents and the text of the first ones."""

import argparse
import shutil
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.config.paths import path_argument
from megalm.config.ranges import Range
from megalm.data.indexed.manifest import check_tokenizer, manifest_path, read_manifest
from megalm.data.indexed.reader import IndexedDataset
from megalm.data.samples.build import open_dataset
from megalm.data.tokenizers import Tokenizer, build_tokenizer
from megalm.data.tokenizers.arguments import add_tokenizer_arguments, tokenizer_config
from megalm.errors import ConfigError

STEP = 1 << 20
"""Documents whose lengths are counted together."""
SHOWN_TOKENS = 120
"""Tokens shown of one document."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `megalm inspect`."""
    parser.description = "Show counts, document lengths and, with a tokenizer, the text of the first documents."
    parser.add_argument("prefix", type=path_argument, metavar="PREFIX", help="Prefix of PREFIX.bin and PREFIX.idx.")
    parser.add_argument("--documents", type=Range(0), default=3, metavar="N", help="Documents to show (%(default)s).")
    add_tokenizer_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints what the dataset holds.

    Raises:
        ConfigError: flags that do not make sense.
        DataError: a dataset or tokenizer that cannot be used, or a tokenizer that is not the dataset's.
    """
    problems: list[str] = []
    config = tokenizer_config(arguments, problems)
    if arguments.documents < 0:
        problems.append(f"--documents {arguments.documents} must be 0 or more")
    if problems:
        raise ConfigError(problems)
    indexed = open_dataset(arguments.prefix)
    tokenizer = build_tokenizer(config) if config.is_given else None
    if tokenizer is not None:
        check_tokenizer(arguments.prefix, tokenizer.identity)
    blocks = describe(indexed), histogram(indexed), first_documents(indexed, tokenizer, arguments.documents)
    print("\n\n".join("\n".join(lines) for lines in blocks if lines))
    return 0


def describe(indexed: IndexedDataset) -> list[str]:
    """Counts and origin, a line each."""
    num_documents = len(indexed.document_indices) - 1
    size = indexed.num_tokens * indexed.dtype.itemsize
    lines = [
        f"{indexed.prefix}: {num_documents:,} documents in {len(indexed):,} sequences",
        f"{indexed.num_tokens:,} tokens, {indexed.dtype.name}, {size / 1e6:,.1f} MB",
    ]
    manifest = read_manifest(manifest_path(indexed.prefix))
    if manifest is None:
        return [*lines, "no manifest: its tokenizer and origin are not known"]
    tokenizer: dict[str, Any] = manifest.get("tokenizer") or {}
    if tokenizer:
        lines.append(
            f"tokenizer {tokenizer.get('type')}, {tokenizer.get('vocab_size') or 'an unknown number of'} ids, end of "
            f"document {tokenizer.get('eod')}, identity {str(tokenizer.get('identity'))[:16]}"
        )
    inputs = manifest.get("inputs", [])
    named = ", ".join(str(entry.get("path") or entry.get("prefix")) for entry in inputs[:5])
    return [*lines, f"made from {len(inputs)} inputs: {named}" + (", ..." if len(inputs) > 5 else "")]


@dataclass
class _Counts:
    """Documents and tokens by size: class n has lengths of n bits, 2^(n-1) .. 2^n - 1 tokens; class 0 is empty."""

    documents: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    shortest: int
    longest: int


def count_lengths(indexed: IndexedDataset) -> _Counts:
    """The lengths of all documents, counted in bounded memory."""
    counts = _Counts(np.zeros(65, dtype=np.int64), np.zeros(65, dtype=np.int64), 2**62, 0)
    boundaries = indexed.document_indices
    for start in range(0, len(boundaries) - 1, STEP):
        ends = boundaries[start : start + STEP + 1]
        sequences = indexed.sequence_lengths[int(ends[0]) : int(ends[-1])]
        before = np.concatenate([[0], np.cumsum(sequences, dtype=np.int64)])
        lengths = np.diff(before[ends - ends[0]])
        sizes = np.frexp(lengths)[1]
        counts.documents += np.bincount(sizes, minlength=65)
        counts.tokens += np.bincount(sizes, weights=lengths, minlength=65).astype(np.int64)  # exact below 2^53
        counts.shortest = min(counts.shortest, int(lengths.min()))
        counts.longest = max(counts.longest, int(lengths.max()))
    return counts


def histogram(indexed: IndexedDataset) -> list[str]:
    """Documents by length, a line for each doubling, with the shares up to there."""
    counts = count_lengths(indexed)
    total, tokens = int(counts.documents.sum()), max(1, int(counts.tokens.sum()))
    used = np.flatnonzero(counts.documents)
    width = max(10, min(40, shutil.get_terminal_size().columns - 64))
    scale = width / int(counts.documents.max())
    lines = [
        f"tokens a document: {counts.shortest:,} to {counts.longest:,}, mean {tokens / total:,.1f}",
        f"{'tokens':>21} {'documents':>13}  up to here: documents, tokens",
    ]
    shares = np.cumsum(counts.documents) / total, np.cumsum(counts.tokens) / tokens
    for size in range(int(used[0]), int(used[-1]) + 1):
        low, high = (0, 0) if size == 0 else (1 << (size - 1), (1 << size) - 1)
        count = int(counts.documents[size])
        bar = "#" * max(round(count * scale), int(count > 0))
        span = f"{low:,}" if low == high else f"{low:,} - {high:,}"
        lines.append(f"{span:>21} {count:>13,} {shares[0][size]:>6.1%} {shares[1][size]:>6.1%} {bar}")
    return lines


def first_documents(indexed: IndexedDataset, tokenizer: Tokenizer | None, count: int) -> list[str]:
    """The first tokens of the first documents: as text with a tokenizer, else as ids."""
    lines = []
    for number in range(min(count, len(indexed.document_indices) - 1)):
        first, last = (int(boundary) for boundary in indexed.document_indices[number : number + 2])
        length = int(indexed.sequence_lengths[first:last].sum(dtype=np.int64))
        ids = next(indexed.blocks(first, last, SHOWN_TOKENS), np.empty(0, dtype=np.int64)).tolist()
        shown = " ".join(map(str, ids)) if tokenizer is None else _printable(tokenizer.decode(ids))
        ends = tokenizer is not None and len(ids) == length > 0 and ids[-1] == tokenizer.special("eod")
        more = " ..." if len(ids) < length else " [end of document]" if ends else ""
        lines.append(f"document {number}, {length:,} tokens: {shown}{more}")
    if tokenizer is None and lines:
        lines.append("(give --tokenizer-model to see text)")
    return lines


def _printable(text: str) -> str:
    """The text on one line, without what could steer a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
