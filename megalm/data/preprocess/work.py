"""The work of one preprocessing worker: a unit of input in, a shard of token ids out."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.data.preprocess.filters import sentences
from megalm.data.preprocess.filters.clean import clean
from megalm.data.preprocess.filters.redact import redact
from megalm.data.preprocess.shards import DIGEST_BYTES, Batch, Fault, ShardWriter, read_about
from megalm.data.preprocess.spec import ProcessingSpec
from megalm.data.preprocess.units import Unit
from megalm.data.text.formats import Document, Rejected, format_of
from megalm.data.text.utf8 import utf8_length
from megalm.data.tokenizers.base import first_line
from megalm.data.tokenizers.encode import WrongIdsError, encoder_of, tokenizer_of
from megalm.data.tokenizers.fast import Encoder
from megalm.errors import DataError, PlatformError
from megalm.storage.documents import DocumentError, validated
from megalm.storage.faults import writing


@dataclass
class Report:
    """What became of one unit, or of all."""

    documents: int = 0
    """Documents (records with all their keys) that were read and could be used."""
    text_bytes: int = 0
    """UTF-8 bytes of the texts that were encoded."""
    tokens: int = 0
    empty: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    """What --clean and --redact-pii have changed."""
    rejected: Counter[str] = field(default_factory=Counter)
    segment_lines: list[int] = field(default_factory=list)
    """Lines of each segment of the unit."""
    first_fault: Fault | None = None
    """The first rejected document; the shard holds all of them."""

    def add(self, other: "Report") -> None:
        """Adds the counts of `other`."""
        for name in ("documents", "text_bytes", "tokens", "empty"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.filtered += other.filtered
        self.changed += other.changed
        self.rejected += other.rejected


def shard_path(folder: Path, unit: Unit) -> Path:
    """Where the shard of a unit lies: its name follows from what it is made from."""
    return folder / f"{unit.source[:40]}.shard"


def finished(folder: Path, unit: Unit) -> Report | None:
    """The report of a unit whose shard is complete; None when there is none."""
    about = read_about(shard_path(folder, unit))
    if about is None:
        return None
    try:
        return validated(Report, about)
    except DocumentError:
        return None


def process_unit(spec: ProcessingSpec, unit: Unit, folder: str, *, stop_at_fault: bool) -> Report:
    """Writes the shard of `unit`; with `stop_at_fault` none is written when a document is rejected.

    Raises:
        DataError: damaged input, or a folder that cannot be written.
    """
    report = Report()
    with writing(folder, DataError, "nothing was published"):
        writer = ShardWriter(shard_path(Path(folder), unit))
        try:
            for batches in _batches(spec, unit, report, writer):
                if stop_at_fault and report.first_fault:
                    return report
                writer.add(batches)
            writer.commit(vars(report))
        finally:
            writer.discard()
    return report


def _batches(spec: ProcessingSpec, unit: Unit, report: Report, writer: ShardWriter) -> Iterator[list[Batch]]:
    """A batch of every key, for each chunk of the input; rejected documents go to the writer."""
    encoder = encoder_of(spec.tokenizer, fast=spec.fast)
    for number, segment in enumerate(unit.segments):
        documents_of = format_of(segment.path).documents
        report.segment_lines.append(0)
        for chunk in segment.read(spec.reading):
            report.segment_lines[number] += chunk.num_lines
            documents: list[Document] = []
            for found in documents_of(chunk, spec.reading):
                if isinstance(found, Document):
                    documents.append(found)
                else:
                    _note_fault(report, writer, number, found)
            own, batches, faults = _encoded(spec, encoder, documents, segment.path)
            for fault in faults:
                _note_fault(report, writer, number, fault)
            report.add(own)
            yield batches


def _encoded(
    spec: ProcessingSpec, encoder: Encoder, documents: list[Document], path: str
) -> tuple[Report, list[Batch], list[Rejected]]:
    """What became of documents: their counts, a batch of every key, and those that the tokenizer refuses."""
    try:
        return *_batch_of_keys(spec, encoder, documents), []
    except _RefusedError:
        usable, faults = [], []
    for document in documents:
        try:
            _batch_of_keys(spec, encoder, [document])
            usable.append(document)
        except _RefusedError as refused:
            faults.append(Rejected(path, document.line, "cannot be encoded", str(refused)))
    return *_batch_of_keys(spec, encoder, usable), faults


def _batch_of_keys(spec: ProcessingSpec, encoder: Encoder, documents: list[Document]) -> tuple[Report, list[Batch]]:
    report = Report(documents=len(documents))
    if repaired := sum(document.repaired for document in documents):
        report.changed["no Unicode, now U+FFFD"] += repaired
    keys = range(len(spec.reading.keys))
    return report, [_batch(spec, encoder, [document.texts[key] for document in documents], report) for key in keys]


class _RefusedError(Exception):
    """The tokenizer refuses one of some texts; says why."""


def _ids_of(encoder: Encoder, texts: Sequence[str]) -> tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.int64]]:
    """The encoder's ids.

    Raises:
        _RefusedError: whatever a tokenizer's library raises; some raise BaseException (a panic in Rust).
    """
    try:
        return encoder(texts)
    except (KeyboardInterrupt, SystemExit, MemoryError, WrongIdsError, PlatformError):
        raise
    except BaseException as error:
        raise _RefusedError(first_line(error)) from error


def _note_fault(report: Report, writer: ShardWriter, segment: int, fault: Rejected) -> None:
    report.rejected[fault.kind] += 1
    noted = segment, fault.line, fault.kind, fault.detail
    report.first_fault = report.first_fault or noted
    writer.add_fault(noted)


def _batch(spec: ProcessingSpec, encoder: Encoder, texts: Sequence[str], report: Report) -> Batch:
    texts = list(_prepared(spec, texts, report))
    digests = _digests(texts) if spec.digests else None
    report.text_bytes += sum(map(utf8_length, texts))
    if spec.split_sentences:
        split = [sentences.split(text, spec.lang, keep_newlines=spec.keep_newlines) for text in texts]
        encoded = [sentence for document in split for sentence in document]
        pieces = np.fromiter(map(len, split), np.int64, len(split))
    else:
        encoded = texts
        pieces = np.ones(len(texts), np.int64)
    ids, lengths = _ids_of(encoder, encoded)
    _check_range(spec, encoded, ids, lengths)
    _count_unknown(spec, ids, lengths, report)
    owner = np.repeat(np.arange(len(texts)), pieces)[lengths > 0]
    counts = np.bincount(owner, minlength=len(texts)).astype(np.int32)
    tokens, lengths = _with_special(spec, ids, lengths[lengths > 0], counts)
    report.empty += int((counts == 0).sum())
    report.tokens += len(tokens)
    return Batch(tokens, lengths.astype(np.int32), counts, digests)


def _prepared(spec: ProcessingSpec, texts: Iterable[str], report: Report) -> Iterator[str]:
    """The texts cleaned and redacted, without those that are too short or too long."""
    for text in texts:
        if spec.clean:
            text = clean(text, report.changed)
        if spec.redact_pii:
            text = redact(text, report.changed)
        if spec.min_chars is not None and len(text) < spec.min_chars:
            report.filtered[f"shorter than --min-chars {spec.min_chars}"] += 1
        elif spec.max_chars is not None and len(text) > spec.max_chars:
            report.filtered[f"longer than --max-chars {spec.max_chars}"] += 1
        else:
            yield text


def _digests(texts: Sequence[str]) -> npt.NDArray[np.uint64]:
    content = b"".join(hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest() for text in texts)
    return np.frombuffer(content, np.uint64).reshape(-1, 2)


def _check_range(
    spec: ProcessingSpec, texts: Sequence[str], ids: npt.NDArray[np.integer[Any]], lengths: npt.NDArray[np.int64]
) -> None:
    vocab_size = tokenizer_of(spec.tokenizer).vocab_size
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        position = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
        text = texts[int(np.searchsorted(np.cumsum(lengths), position, side="right"))]
        raise DataError(
            f"the tokenizer gave id {ids[position]}, outside its vocabulary of {vocab_size}, in {text[:60]!r}; "
            "its file is inconsistent, give another --tokenizer-model"
        )


def _count_unknown(
    spec: ProcessingSpec, ids: npt.NDArray[np.integer[Any]], lengths: npt.NDArray[np.int64], report: Report
) -> None:
    """Counts the texts that the vocabulary lacks altogether: what is not <unk> in them decodes to nothing."""
    tokenizer = tokenizer_of(spec.tokenizer)
    unknown = tokenizer.special("unk")
    if unknown is None or not (is_unknown := ids == unknown).any():
        return
    ends = np.cumsum(lengths)
    sums = np.concatenate([[0], np.cumsum(is_unknown)])
    counts = sums[ends] - sums[ends - lengths]
    report.changed["texts with <unk> for what the vocabulary lacks"] += int((counts > 0).sum())
    for number in np.flatnonzero((counts > 0) & (lengths <= 2 * counts + 1)).tolist():
        row = ids[ends[number] - lengths[number] : ends[number]]
        if not tokenizer.decode(row[row != unknown].tolist()).strip():
            report.changed["texts that are nothing but <unk>"] += 1


def _with_special(
    spec: ProcessingSpec,
    ids: npt.NDArray[np.integer[Any]],
    lengths: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int32],
) -> tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.int64]]:
    """(tokens, lengths) with begin and end of document added to each document that is not empty."""
    tokens = ids.astype(spec.dtype)
    tokenizer = tokenizer_of(spec.tokenizer)
    last = np.cumsum(counts[counts > 0]) - 1
    first = last - counts[counts > 0] + 1
    for wanted, token, sequences, offset in (
        (spec.append_eod, tokenizer.special("eod"), last, 1),
        (spec.prepend_bos, tokenizer.special("bos"), first, 0),
    ):
        if wanted and len(sequences):
            assert token is not None, "checked before the workers start"
            starts = np.cumsum(lengths) - lengths
            tokens = np.insert(tokens, (starts + lengths * offset)[sequences], token)
            lengths = lengths.copy()
            lengths[sequences] += 1
    return tokens, lengths
