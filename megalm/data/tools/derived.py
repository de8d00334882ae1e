"""Datasets made from other datasets: written under temporary names, then published with manifests of their own."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megalm import __version__
from megalm.data.indexed.manifest import ends_documents, manifest_bytes, manifest_path, read_manifest
from megalm.data.indexed.reader import IndexedDataset
from megalm.data.indexed.writer import IndexedDatasetBuilder
from megalm.errors import DataError
from megalm.storage.atomic import atomic_write


def common_tokenizer(inputs: Sequence[IndexedDataset]) -> dict[str, Any] | None:
    """The tokenizer that the manifests of all inputs name; None where one of them does not tell.

    Raises:
        DataError: two inputs were made with different tokenizers, so their ids mean different things.
    """
    named = [(read_manifest(manifest_path(indexed.prefix)) or {}).get("tokenizer") for indexed in inputs]
    known = [(indexed, entry) for indexed, entry in zip(inputs, named, strict=True) if entry]
    for indexed, entry in known[1:]:
        first, other = known[0][1].get("identity"), entry.get("identity")
        if first != other:
            raise DataError(
                f"{known[0][0].prefix} was made with tokenizer {str(first)[:16]}..., {indexed.prefix} with "
                f"{str(other)[:16]}...; preprocess one of them again with the other's tokenizer"
            )
    return known[0][1] if known and len(known) == len(inputs) else None


def common_ends(inputs: Sequence[IndexedDataset]) -> bool | None:
    """Whether the documents of all inputs end with an end-of-document token; None where one does not tell.

    Raises:
        DataError: some do and some do not.
    """
    told = {indexed.prefix: ends_documents(indexed.prefix) for indexed in inputs}
    having = [prefix for prefix, ends in told.items() if ends]
    lacking = [prefix for prefix, ends in told.items() if ends is False]
    if having and lacking:
        raise DataError(
            f"the documents of {having[0]} end with an end-of-document token (--append-eod), those of {lacking[0]} do "
            "not; preprocess one of them again"
        )
    return None if None in told.values() else bool(having)


def publish_datasets(
    builders: Iterable[IndexedDatasetBuilder], inputs: Sequence[IndexedDataset], options: Sequence[dict[str, Any]]
) -> list[str]:
    """Publishes datasets that hold parts of `inputs`; returns a line on each.

    All are on disk before the first gets its final name. `options` says for each how it was made.
    """
    tokenizer, ends = common_tokenizer(inputs), common_ends(inputs)
    origin = [_origin(indexed) for indexed in inputs]
    prepared = [(builder, builder.prepare()) for builder in builders]
    lines = []
    for (builder, files), option in zip(prepared, options, strict=True):
        content = {
            "megalm": __version__,
            "inputs": origin,
            "options": option | ({} if ends is None else {"append_eod": ends}),
            **({"tokenizer": tokenizer} if tokenizer else {}),
            "documents": files.num_documents,
            "tokens": files.num_tokens,
            "dtype": builder.dtype.name,
            "bin": {"bytes": files.bin_bytes, "sha256": files.bin_sha256},
            "idx": {"bytes": files.idx_bytes, "sha256": files.idx_sha256},
        }
        path = manifest_path(builder.prefix)
        path.unlink(missing_ok=True)  # an old manifest must never be seen beside a new dataset
        builder.publish()
        with atomic_write(path) as stream:
            stream.write(manifest_bytes(content))
        lines.append(f"{builder.prefix}: {files.num_documents:,} documents, {files.num_tokens:,} tokens")
    return lines


def require_other_prefixes(outputs: Iterable[str], inputs: Iterable[str]) -> None:
    """Checks that no dataset is written over one that is read.

    Raises:
        DataError: an output that is an input.
    """
    taken = {Path(prefix).resolve() for prefix in inputs}
    for output in outputs:
        if Path(output).resolve() in taken:
            raise DataError(f"{output} is read and cannot be written; give another --output-prefix")


def _origin(indexed: IndexedDataset) -> dict[str, Any]:
    manifest = read_manifest(manifest_path(indexed.prefix)) or {}
    known = {"bin_sha256": manifest["bin"]["sha256"]} if manifest.get("bin") else {}
    counts = {"documents": len(indexed.document_indices) - 1, "tokens": indexed.num_tokens}
    return {"prefix": indexed.prefix, **counts, **known}
