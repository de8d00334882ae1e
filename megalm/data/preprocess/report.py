"""What a run tells at its end: the summary on the terminal and the manifest beside each dataset."""

import importlib.metadata
import platform
from dataclasses import dataclass
from typing import Any

from megalm.data.indexed.writer import BuiltFiles
from megalm.data.preprocess.options import PreprocessOptions
from megalm.data.preprocess.spec import ProcessingSpec
from megalm.data.preprocess.work import Report
from megalm.data.tokenizers import Tokenizer

_PACKAGES = ("numpy", "sentencepiece", "tokenizers", "tiktoken", "gigatoken", "pyarrow", "zstandard")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run has read and made."""

    spec: ProcessingSpec
    tokenizer: Tokenizer
    inputs: list[tuple[str, int, str]]
    """(path, bytes, SHA-256) of each file."""
    totals: Report
    duplicates: dict[str, int]
    """Documents of each key that were left out because an equal one came before."""
    encoder: str
    fingerprint: str
    elapsed_s: float


def manifest_of(key: str, options: PreprocessOptions, outcome: Outcome, files: BuiltFiles) -> dict[str, Any]:
    """The manifest of the dataset of one key."""
    spec, tokenizer, totals = outcome.spec, outcome.tokenizer, outcome.totals
    flags = (
        "append_eod", "prepend_bos", "clean", "redact_pii", "min_chars", "max_chars",
        "split_sentences", "keep_newlines", "lang",
    )  # fmt: skip
    return {
        "megalm": spec.versions()["megalm"],
        "fingerprint": outcome.fingerprint,
        "inputs": [{"path": path, "bytes": size, "sha256": digest} for path, size, digest in outcome.inputs],
        "options": {
            "json_key": key,
            "text_documents": spec.reading.text_documents,
            "max_line_bytes": spec.reading.max_line_bytes,
            **{name: getattr(spec, name) for name in flags},
            "dedup": "exact" if options.dedup else None,
            "shuffle_seed": options.seed if options.shuffle else None,
            "skip_bad": options.skip_bad,
        },
        "tokenizer": {
            "type": type(tokenizer).__name__,
            "identity": tokenizer.identity,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.special("eod"),
        },
        "documents": files.num_documents,
        "sequences": files.num_sequences,
        "tokens": files.num_tokens,
        "text_bytes": totals.text_bytes,
        "dtype": spec.dtype,
        "empty": totals.empty,
        "rejected": dict(sorted(totals.rejected.items())),
        "filtered": dict(sorted(totals.filtered.items())),
        "changed": dict(sorted(totals.changed.items())),
        "duplicates": outcome.duplicates.get(key, 0),
        "bin": {"bytes": files.bin_bytes, "sha256": files.bin_sha256},
        "idx": {"bytes": files.idx_bytes, "sha256": files.idx_sha256},
        "versions": {"python": platform.python_version(), **_installed(), **spec.versions()},
    }


def _installed() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def summary(
    options: PreprocessOptions, outcome: Outcome, built: list[BuiltFiles], num_workers: int, left_out: list[str]
) -> str:
    """What was made and how fast, what was left out (`left_out`: whole files), and how to go on."""
    totals, tokenizer = outcome.totals, outcome.tokenizer
    lines = [
        f"{options.prefix_of(key)}: {files.num_documents:,} documents, {files.num_tokens:,} tokens, "
        f"{files.bin_bytes / 1e6:.1f} MB"
        for key, files in zip(options.reading.keys, built, strict=True)
    ]
    size_mb, seconds = totals.text_bytes / 1e6, max(outcome.elapsed_s, 1e-9)
    lines.append(
        f"{size_mb:.1f} MB of text in {seconds:.1f} s = {size_mb / seconds:.1f} MB/s with {num_workers} workers"
        f", {totals.text_bytes / max(1, totals.tokens):.2f} bytes a token"
    )
    lines.append(
        f"tokenizer {type(tokenizer).__name__}, {tokenizer.vocab_size:,} ids, identity {tokenizer.identity[:16]}"
    )
    lines.append(outcome.encoder)
    if left_out:
        more = ", ..." if len(left_out) > 3 else ""
        lines.append(f"files left out, whose names tell no text: {len(left_out):,} ({', '.join(left_out[:3])}{more})")
    if totals.empty:
        lines.append(f"{totals.empty:,} empty documents: boundaries without a sequence, as Megatron writes them")
    lines += [f"{count:,} documents rejected: {kind}" for kind, count in sorted(totals.rejected.items())]
    lines += [f"{count:,} documents left out: {kind}" for kind, count in sorted(totals.filtered.items())]
    lines += [
        f"{count:,} documents of {key} left out: equal to an earlier one" for key, count in outcome.duplicates.items()
    ]
    lines += [f"{count:,} x {kind}" for kind, count in sorted(totals.changed.items())]
    if options.reject_file:
        lines.append(f"rejected documents are listed in {options.reject_file}")
    lines.append(f"train with --data-path {options.prefix_of(options.reading.keys[0])}")
    return "\n".join(lines)
