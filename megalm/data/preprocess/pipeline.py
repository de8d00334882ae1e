"""Input files to indexed datasets: the same bytes whatever the number of workers and however often it was killed.

Phases: open everything and check -> units to workers, each leaves a shard in P.parts -> shards to .bin and .idx, under
temporary names -> publish (renames, manifests) -> remove P.parts. A run that is killed in any phase is continued by
the same command; a shard counts when it has its final name, and is found by what it is made from.
"""

import contextlib
import functools
import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megalm.data.indexed.manifest import manifest_bytes, manifest_path
from megalm.data.indexed.writer import BuiltFiles, IndexedDatasetBuilder
from megalm.data.preprocess import shuffle
from megalm.data.preprocess.filters import dedup
from megalm.data.preprocess.options import PreprocessOptions
from megalm.data.preprocess.parts import check_output, is_complete, locked_parts, publishing_marker
from megalm.data.preprocess.pool import UNITS_PER_WORKER, in_order
from megalm.data.preprocess.report import Outcome, manifest_of, summary
from megalm.data.preprocess.shards import Batch, Fault, read_batches, read_faults
from megalm.data.preprocess.spec import ProcessingSpec
from megalm.data.preprocess.units import Planner, Unit
from megalm.data.preprocess.work import Report, finished, process_unit, shard_path
from megalm.data.progress import Progress
from megalm.data.text.formats import Document, Rejected
from megalm.data.text.input_file import InputFile
from megalm.data.text.inputs import expand
from megalm.data.tokenizers import Tokenizer
from megalm.data.tokenizers.encode import WrongIdsError, choose_encoder, tokenizer_of
from megalm.errors import DataError
from megalm.storage.atomic import atomic_write
from megalm.storage.durable import replace_text, sha256_of
from megalm.storage.faults import writing

SAMPLE_BYTES = 1 << 18
"""Input on which the fast encoder is compared with the library before it is used."""
SAMPLE_FILES = 32
"""Files that it is taken from, at most."""


def preprocess(options: PreprocessOptions, executor: Executor, num_workers: int) -> str:
    """Writes the datasets of `options` and returns a summary; nothing is published when anything goes wrong.

    Raises:
        DataError: input, tokenizer or output that cannot be used; the message names file and line.
        PlatformError: a worker died, or a package is missing.
    """
    tokenizer = tokenizer_of(options.tokenizer)
    spec = options.spec(tokenizer)
    inputs = expand(options.inputs)
    files = [InputFile(path) for path in inputs.files]
    fingerprint = _fingerprint(options, spec.digest(tokenizer), files)
    if not options.overwrite and is_complete(options, fingerprint):
        with contextlib.suppress(DataError), locked_parts(options):
            pass  # what a run that was killed while it cleaned up has left
        return f"{', '.join(options.prefixes)}: complete already, made from the same input with the same options"
    with _disk_named(options), locked_parts(options):
        check_output(options, fingerprint)
        choice = choose_encoder(options.tokenizer, _sample(files, spec)) if options.fast_encoder else None
        spec = replace(spec, fast=choice is not None and choice.fast)
        run = _Run(options, spec, tokenizer, files, fingerprint)
        run.encoder = choice.reason if choice else f"encoder: {type(tokenizer).__name__}'s own library (as asked)"
        try:
            run.encode(executor, num_workers)
        except WrongIdsError:
            for shard in options.parts.glob("*.shard"):
                shard.unlink()  # made by the same encoder
            raise
        built = run.publish()
        return summary(options, run.outcome(), built, num_workers, inputs.left_out)


@contextlib.contextmanager
def _disk_named(options: PreprocessOptions) -> Iterator[None]:
    """Turns what the system says of files beside the output (no space, no inodes, no right) into a DataError."""
    with writing(options.output_prefix, DataError, "the same command goes on from what is finished"):
        yield


class _Run:
    """One run: the units in order, what they gave, and the datasets made of them."""

    encoder = ""

    def __init__(
        self,
        options: PreprocessOptions,
        spec: ProcessingSpec,
        tokenizer: Tokenizer,
        files: list[InputFile],
        fingerprint: str,
    ) -> None:
        self._options, self._spec, self._tokenizer, self._files = options, spec, tokenizer, files
        self._fingerprint = fingerprint
        self._shards: list[Path] = []
        self._totals = Report()
        self._sha256: dict[str, str] = {}
        self._duplicates: Counter[str] = Counter()
        self._resumed = 0
        self._progress = Progress(sum(file.size for file in files), options.log_interval)

    def encode(self, executor: Executor, num_workers: int) -> None:
        """Makes the shard of every unit; afterwards `_shards` has them in order."""
        spec, parts = self._spec, self._options.parts
        stop = not self._options.skip_bad
        planner = Planner(self._files, spec.reading, spec.digest(self._tokenizer))
        work = functools.partial(_work, spec, str(parts), stop)
        digests: list[tuple[str, Future[str]]] = []

        def tasks() -> Iterator[tuple[Unit, Report | None]]:
            yield from ((unit, finished(parts, unit)) for unit in planner.units())
            # the last units are under way: workers that have none left hash the input
            known = [file.path for file in self._files if file.is_regular and not _is_streamed(file)]
            digests.extend((path, executor.submit(sha256_of, path)) for path in known)

        lines = _LineCounter()
        with contextlib.ExitStack() as stack:
            stack.callback(self._progress.close)
            # Not yet under its own name: the lock of that file would go to the workers too, and outlive a kill.
            rejects = stack.enter_context(open(parts / "rejected", "w+b"))
            done_bytes = 0
            for unit, report in in_order(executor, tasks(), work, UNITS_PER_WORKER * num_workers):
                shard = shard_path(parts, unit)
                self._handle_faults(lines.of(unit, report, self._faults_of(shard, report)), rejects)
                self._shards.append(shard)
                self._totals.add(report)
                done_bytes += unit.input_bytes
                self._progress.update(done_bytes, self._totals.text_bytes, self._totals.documents, self._totals.tokens)
            self._sha256 = planner.sha256 | {path: future.result() for path, future in digests}
            if self._options.reject_file:
                rejects.seek(0)
                with atomic_write(Path(self._options.reject_file)) as stream:
                    shutil.copyfileobj(rejects, stream)
        self._check_unchanged()

    def _faults_of(self, shard: Path, report: Report) -> Iterator[Fault]:
        """The rejected documents of a unit, as far as they are wanted: the first one when it ends the run."""
        if report.first_fault is None:
            return iter(())
        if not self._options.skip_bad:
            return iter([report.first_fault])
        return read_faults(shard) if self._options.reject_file else iter(())

    def _handle_faults(self, faults: Iterator[Rejected], rejects: BinaryIO) -> None:
        for fault in faults:
            if not self._options.skip_bad:
                raise DataError(f"{fault}; correct the line, or leave such lines out with --on-error skip")
            rejects.write(f"{fault}\n".encode(errors="backslashreplace"))

    def _check_unchanged(self) -> None:
        for file in self._files:
            if file.is_regular and InputFile(file.path).modified_ns != file.modified_ns:
                raise DataError(f"{file.path} was changed while it was read; run again when it is complete")

    def publish(self) -> list[BuiltFiles]:
        """Makes the datasets of all keys and gives them their names."""
        scratch = self._options.parts / "assembly"
        shutil.rmtree(scratch, ignore_errors=True)
        built = []
        with contextlib.ExitStack() as stack:
            writers = []
            for number, prefix in enumerate(self._options.prefixes):
                own = scratch / str(number)
                own.mkdir(parents=True)
                writer = stack.enter_context(IndexedDatasetBuilder(prefix, self._spec.dtype, overwrite=True))
                with writer.writing():
                    for batch in self._batches(number, own):
                        writer.add_documents(batch.tokens, batch.lengths, batch.counts)
                if writer.num_sequences == 0:
                    for shard in self._shards:
                        shard.unlink()  # nothing to go on from
                    raise DataError(self._nothing_left(prefix))
                built.append(writer.prepare())
                writers.append(writer)
            # From here on files under the final names are this run's own.
            replace_text(publishing_marker(self._options.parts), self._fingerprint)
            outcome = self.outcome()
            for key, writer, files in zip(self._options.reading.keys, writers, built, strict=True):
                path = manifest_path(writer.prefix)
                path.unlink(missing_ok=True)  # an old manifest must never be seen beside a new dataset
                writer.publish()
                with atomic_write(path) as stream:
                    stream.write(manifest_bytes(manifest_of(key, self._options, outcome, files)))
        return built

    def _batches(self, key: int, scratch: Path) -> Iterator[Batch]:
        """The documents of one key as they are to be written."""
        batches = self._stored(key)
        token_bytes = self._totals.tokens * np.dtype(self._spec.dtype).itemsize
        if self._options.dedup:
            num_documents = sum(len(batch.counts) for batch in self._stored(key))
            flags = dedup.duplicates(self._stored(key), num_documents, scratch / "dedup")
            self._duplicates[self._options.reading.keys[key]] = int(flags.sum())
            batches = dedup.without(batches, flags)
        if self._options.shuffle:
            batches = shuffle.shuffled(batches, self._options.seed, token_bytes, scratch / "shuffle")
        return batches

    def _stored(self, key: int) -> Iterator[Batch]:
        for path in self._shards:
            yield from read_batches(path, len(self._spec.reading.keys), key, np.dtype(self._spec.dtype))

    def _nothing_left(self, prefix: str) -> str:
        totals = self._totals
        kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(totals.rejected.items()))
        return (
            f"{prefix} would be empty: {totals.documents} documents were read, {totals.empty} of them empty, "
            f"{totals.filtered.total()} filtered out, {totals.rejected.total()} rejected"
            f"{f' ({kinds})' if kinds else ''}; give input with text"
        )

    def outcome(self) -> Outcome:
        """What manifest and summary tell."""
        return Outcome(
            spec=self._spec,
            tokenizer=self._tokenizer,
            inputs=[(file.path, file.size, self._sha256[file.path]) for file in self._files],
            totals=self._totals,
            duplicates=dict(self._duplicates),
            encoder=self.encoder,
            fingerprint=self._fingerprint,
            elapsed_s=self._progress.elapsed_s,
        )


def _work(spec: ProcessingSpec, folder: str, stop_at_fault: bool, unit: Unit) -> Report:
    return process_unit(spec, unit, folder, stop_at_fault=stop_at_fault)


def _is_streamed(file: InputFile) -> bool:
    return not file.format.is_table and not (file.compression is None and file.format.splits_at_lines)


class _LineCounter:
    """Adds up the lines of each file over its units, which come in order."""

    def __init__(self) -> None:
        self._path, self._lines = "", 0

    def of(self, unit: Unit, report: Report, faults: Iterator[Fault]) -> Iterator[Rejected]:
        """The rejected documents of a unit, with their line in the file."""
        fault = next(faults, None)
        for number, (segment, lines) in enumerate(zip(unit.segments, report.segment_lines, strict=False)):
            if segment.path != self._path:
                self._path, self._lines = segment.path, 0
            while fault is not None and fault[0] == number:
                yield Rejected(segment.path, self._lines + fault[1], fault[2], fault[3])
                fault = next(faults, None)
            self._lines += lines


def _sample(files: list[InputFile], spec: ProcessingSpec) -> list[str]:
    """The first documents of files spread over all those that can be read twice."""
    readable = [file for file in files if file.is_regular]
    chosen = readable[:: -(-len(readable) // SAMPLE_FILES)] if readable else []
    return [text for file in chosen for text in _first_texts(file, spec, SAMPLE_BYTES // len(chosen))]


def _first_texts(file: InputFile, spec: ProcessingSpec, limit: int) -> Iterator[str]:
    size = 0
    with contextlib.suppress(DataError):  # told with its line when its turn comes
        for found in islice(file.documents(spec.reading), 10_000):
            if isinstance(found, Document):
                for text in found.texts:
                    yield text[:limit]
                size += sum(map(len, found.texts))
                if size >= limit:
                    return


def _fingerprint(options: PreprocessOptions, spec_digest: str, files: list[InputFile]) -> str:
    """Digest of all that the datasets are made from; "" when the input cannot be read twice."""
    if not all(file.is_regular for file in files):
        return ""
    asked = [options.dedup, options.shuffle, options.seed if options.shuffle else None, options.skip_bad]
    sources = [(file.path, file.size, file.modified_ns) for file in files]
    return hashlib.sha256(repr([spec_digest, asked, sources]).encode()).hexdigest()
