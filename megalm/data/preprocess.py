"""`megalm preprocess`: text files to indexed datasets, the same bytes whatever the number of workers.

Phases: open everything and check -> read chunks, encode in workers, write in order -> bring to disk -> publish.
The main process reads and writes; at most a few chunks per worker are under way, so memory is bounded.
"""

import argparse
import collections
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from megalm import __version__
from megalm.config.data import TokenizerConfig
from megalm.data.atomic import atomic_write
from megalm.data.encode import EncodedChunk, Encoding, encode_chunk, tokenizer_of
from megalm.data.indexed import BuiltFiles, IndexedDatasetBuilder, best_dtype
from megalm.data.manifest import manifest_bytes, manifest_path
from megalm.data.processes import follow_parent
from megalm.data.progress import Progress
from megalm.data.readers import Chunk, InputFile, Rejected
from megalm.data.tokenizers import Tokenizer
from megalm.data.tokenizers.arguments import add_tokenizer_arguments, tokenizer_config
from megalm.errors import ConfigError, DataError, PlatformError

CHUNKS_PER_WORKER = 3
"""Chunks under way for each worker: one in work, one waiting, one done and not yet its turn."""


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """What to preprocess and how."""

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer: TokenizerConfig
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    workers: int = 1
    skip_bad: bool = False
    """Leave out documents that cannot be used; False: the first one is an error."""
    reject_file: str | None = None
    overwrite: bool = False
    log_interval: int | None = None

    def prefix_of(self, key: str) -> str:
        """Prefix of the dataset of one key."""
        return f"{self.output_prefix}_{key}_document"


@dataclass
class Totals:
    """What has been written so far, of all keys."""

    lines: int = 0
    """Documents read and accepted."""
    empty: int = 0
    text_bytes: int = 0
    tokens: int = 0
    rejected: collections.Counter[str] = field(default_factory=collections.Counter)

    def add(self, chunk: EncodedChunk) -> None:
        """Counts one chunk."""
        self.lines += len(chunk.keys[0].lengths) + chunk.keys[0].num_empty
        self.empty += sum(key.num_empty for key in chunk.keys)
        self.text_bytes += sum(key.text_bytes for key in chunk.keys)
        self.tokens += sum(len(key.tokens) for key in chunk.keys)
        self.rejected.update(rejected.kind for rejected in chunk.rejected)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `megalm preprocess`, with Megatron's names."""
    parser.description = "Turn text (JSON lines, plain or .gz) into the indexed datasets that training reads."
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="Input files, in this order.")
    parser.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="Keys to extract (text).")
    parser.add_argument(
        "--output-prefix", required=True, metavar="P", help="Writes P_KEY_document.bin, .idx and .manifest.json."
    )
    add_tokenizer_arguments(parser)
    parser.add_argument("--append-eod", action="store_true", help="End each document with the end-of-document token.")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="Processes that tokenize (1).")
    policy = "A line that cannot be used ends the run (default), or is left out and counted."
    parser.add_argument("--on-error", choices=("fail", "skip"), default="fail", help=policy)
    parser.add_argument("--reject-file", metavar="F", help="With --on-error skip: list each line left out, and why.")
    parser.add_argument("--overwrite", action="store_true", help="Replace datasets that exist.")
    parser.add_argument("--log-interval", type=int, metavar="N", help="Progress every N documents (default: by time).")


def run(arguments: argparse.Namespace) -> int:
    """Preprocesses and prints a summary.

    Raises:
        ConfigError: flags that do not make sense.
        DataError: input, tokenizer or output that cannot be used.
        PlatformError: a worker process died.
    """
    options = options_of(arguments)
    print(preprocess(options))
    return 0


def options_of(arguments: argparse.Namespace) -> PreprocessOptions:
    """The checked options of the command line.

    Raises:
        ConfigError: every problem found.
    """
    found = []
    for name in ("workers", "log_interval"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            found.append(f"--{name.replace('_', '-')} {value} must be 1 or more")
    if arguments.reject_file is not None and arguments.on_error != "skip":
        found.append("--reject-file lists lines that are left out; add --on-error skip")
    for name, values in (("--input", arguments.input), ("--json-keys", arguments.json_keys)):
        if twice := [value for value, count in collections.Counter(values).items() if count > 1]:
            found.append(f"{name} names {', '.join(twice)} twice; name each once")
    tokenizer = tokenizer_config(arguments, found)
    if found:
        raise ConfigError(found)
    return PreprocessOptions(
        inputs=tuple(arguments.input),
        output_prefix=arguments.output_prefix,
        tokenizer=tokenizer,
        json_keys=tuple(arguments.json_keys),
        append_eod=arguments.append_eod,
        workers=arguments.workers,
        skip_bad=arguments.on_error == "skip",
        reject_file=arguments.reject_file,
        overwrite=arguments.overwrite,
        log_interval=arguments.log_interval,
    )


def preprocess(options: PreprocessOptions) -> str:
    """Writes the datasets of `options` and returns a summary; nothing is published when anything goes wrong.

    Raises:
        DataError: input, tokenizer or output that cannot be used; the message names file and line.
        PlatformError: a worker process died.
    """
    tokenizer = tokenizer_of(options.tokenizer)
    if options.append_eod and tokenizer.eod is None:
        raise DataError("--append-eod needs a tokenizer with an end-of-document token; give --eod-token, or drop it")
    encoding = Encoding(options.tokenizer, options.json_keys, options.append_eod, best_dtype(tokenizer.vocab_size).name)
    inputs = [InputFile(path) for path in options.inputs]
    progress = Progress(sum(file.size for file in inputs), options.log_interval)
    totals = Totals()
    with contextlib.ExitStack() as stack:
        builders = [
            stack.enter_context(
                IndexedDatasetBuilder(options.prefix_of(key), encoding.dtype, overwrite=options.overwrite)
            )
            for key in options.json_keys
        ]
        rejects = stack.enter_context(atomic_write(Path(options.reject_file))) if options.reject_file else None
        stack.callback(progress.close)
        read: collections.deque[int] = collections.deque()
        for encoded in _encoded(encoding, _chunks(inputs, read), options.workers):
            _handle_rejected(encoded.rejected, options, rejects)
            for builder, key in zip(builders, encoded.keys, strict=True):
                builder.add_documents(key.tokens, key.lengths)
            totals.add(encoded)
            progress.update(read.popleft(), totals.text_bytes, totals.lines, totals.tokens)
        built = _publish(builders, options, inputs, tokenizer, totals)
    return _summary(options, tokenizer, totals, built, progress.elapsed_s)


def _chunks(inputs: list[InputFile], read: collections.deque[int]) -> Iterator[Chunk]:
    """The chunks of all files; appends to `read` how much input is read after each, since many are under way."""
    for file in inputs:
        for chunk in file.chunks():
            read.append(sum(earlier.bytes_read for earlier in inputs))
            yield chunk


def _handle_rejected(rejected: tuple[Rejected, ...], options: PreprocessOptions, rejects: BinaryIO | None) -> None:
    if rejected and not options.skip_bad:
        raise DataError(f"{rejected[0]}; correct the line, or leave such lines out with --on-error skip")
    if rejects is not None:
        rejects.writelines(f"{entry}\n".encode(errors="backslashreplace") for entry in rejected)


def _encoded(encoding: Encoding, chunks: Iterator[Chunk], workers: int) -> Iterator[EncodedChunk]:
    """The encoded chunks in the order of `chunks`, with at most CHUNKS_PER_WORKER per worker under way."""
    executor = ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), initializer=_start_worker, initargs=(os.getpid(),)
    )
    try:
        yield from _in_order(executor, encoding, chunks, CHUNKS_PER_WORKER * workers)
    except BrokenProcessPool as error:
        raise PlatformError(
            "a worker process died; a kill for lack of memory is the usual cause: lower --workers. "
            "Nothing was published"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _in_order(executor: Executor, encoding: Encoding, chunks: Iterator[Chunk], window: int) -> Iterator[EncodedChunk]:
    pending: collections.deque[Future[EncodedChunk]] = collections.deque()
    for chunk in chunks:
        if len(pending) == window:
            yield pending.popleft().result()
        pending.append(executor.submit(encode_chunk, encoding, chunk))
    while pending:
        yield pending.popleft().result()


def _start_worker(parent: int) -> None:
    # Ctrl-C goes to the whole group; the main process answers it and ends the workers.
    follow_parent(parent, [signal.SIGINT])


def _publish(
    builders: list[IndexedDatasetBuilder],
    options: PreprocessOptions,
    inputs: list[InputFile],
    tokenizer: Tokenizer,
    totals: Totals,
) -> list[BuiltFiles]:
    for builder in builders:
        if builder.num_sequences == 0:
            raise DataError(
                f"{builder.prefix} would be empty: {totals.lines} documents were read, {totals.empty} of them empty, "
                f"{totals.rejected.total()} rejected; give input with text"
            )
    built = [builder.prepare() for builder in builders]
    for key, builder, files in zip(options.json_keys, builders, built, strict=True):
        path = manifest_path(builder.prefix)
        path.unlink(missing_ok=True)  # an old manifest must never be seen beside a new dataset
        builder.publish()
        with atomic_write(path) as stream:
            stream.write(manifest_bytes(_manifest(key, options, inputs, tokenizer, totals, builder, files)))
    return built


def _manifest(
    key: str,
    options: PreprocessOptions,
    inputs: list[InputFile],
    tokenizer: Tokenizer,
    totals: Totals,
    builder: IndexedDatasetBuilder,
    files: BuiltFiles,
) -> dict[str, Any]:
    kind = type(tokenizer).__name__
    return {
        "megalm": __version__,
        "inputs": [{"path": file.path, "bytes": file.size, "sha256": file.sha256} for file in inputs],
        "options": {"json_key": key, "append_eod": options.append_eod, "skip_bad": options.skip_bad},
        "tokenizer": {
            "type": kind,
            "identity": tokenizer.identity,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
        },
        "documents": files.num_documents,
        "tokens": files.num_tokens,
        "dtype": builder.dtype.name,
        "rejected": dict(sorted(totals.rejected.items())),
        "bin": {"bytes": files.bin_bytes, "sha256": files.bin_sha256},
        "idx": {"bytes": files.idx_bytes, "sha256": files.idx_sha256},
    }


def _summary(
    options: PreprocessOptions, tokenizer: Tokenizer, totals: Totals, built: list[BuiltFiles], elapsed_s: float
) -> str:
    lines = [
        f"{options.prefix_of(key)}: {files.num_documents:,} documents, {files.num_tokens:,} tokens, "
        f"{files.bin_bytes / 1e6:.1f} MB"
        for key, files in zip(options.json_keys, built, strict=True)
    ]
    size_mb = totals.text_bytes / 1e6
    lines.append(
        f"{size_mb:.1f} MB of text in {elapsed_s:.1f} s = {size_mb / elapsed_s:.1f} MB/s with {options.workers} workers"
        f", {totals.text_bytes / max(1, totals.tokens):.2f} bytes a token"
    )
    lines.append(
        f"tokenizer {type(tokenizer).__name__}, {tokenizer.vocab_size:,} ids, identity {tokenizer.identity[:16]}"
    )
    if totals.empty:
        lines.append(f"{totals.empty:,} empty documents were left out")
    lines += [f"{count:,} lines rejected: {kind}" for kind, count in sorted(totals.rejected.items())]
    lines.append(f"train with --data-path {options.prefix_of(options.json_keys[0])}")
    return "\n".join(lines)
