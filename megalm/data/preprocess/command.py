"""The flags of `megalm preprocess`, checked, and the workers that they ask for."""

import argparse
import collections
from typing import Any, get_args

from megalm.config.paths import path_argument
from megalm.config.ranges import Range
from megalm.data.preprocess import mpi
from megalm.data.preprocess.options import PreprocessOptions
from megalm.data.preprocess.pipeline import preprocess
from megalm.data.preprocess.pool import local_workers
from megalm.data.text.formats import MAX_LINE_BYTES, Reading
from megalm.data.tokenizers.arguments import add_tokenizer_arguments, tokenizer_config
from megalm.errors import ConfigError
from megalm.tables import import_modules

PEER_FLAGS = {
    "--partitions": "the input is shared out by itself: give --workers, or start MPI ranks with --mpi",
    "--keep-sequential-samples": "documents are always in the order of the input: drop it",
    "--find-optimal-num-workers": "try --workers with a part of the input",
    "--workers-to-check": "try --workers with a part of the input",
    "--max-documents": "give a part of the input",
    "--num-docs": "progress goes by bytes: drop it",
    "--ftfy": "use --clean",
    "--jsonl-keys": "use --json-keys",
    "--seq-length": "texts are not cut here, samples are in training: drop it",
    "--dataset-impl": "datasets are always memory-mapped: drop it",
    "--trust-remote-code": "no code from a tokenizer's folder is run: drop it",
    "--tokenizer-hf-use-fast": "tokenizer.json is read as it is: drop it",
    "--tokenizer-sentencepiece-legacy": "texts are encoded as they are: drop it",
}
"""Flags of Megatron-LM's, Megatron-DeepSpeed's and GPT-NeoX's preprocess_data.py: what to do instead."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `megalm preprocess`, with Megatron's names."""
    parser.description = (
        "Turn text (.jsonl, .txt, plain, .gz or .zst; .parquet) into the indexed datasets that training reads. "
        "A run that was killed is continued by the same command."
    )
    _add_input(parser.add_argument_group("input"))
    _add_cleaning(parser.add_argument_group("cleaning"))
    group = parser.add_argument_group("tokenizer")
    add_tokenizer_arguments(group)
    _switch(group, "--append-eod", "End each document with the end-of-document token.")
    _switch(group, "--prepend-bos", "Begin each document with the begin-of-sequence token.")
    group.add_argument(
        "--encoder", choices=("auto", "library"), default="auto",
        help="auto: a fast one where it gives the same ids (default). library: the tokenizer's own.",
    )  # fmt: skip
    _add_output(parser.add_argument_group("output"))
    _add_runtime(parser.add_argument_group("runtime"))


def _switch(group: Any, name: str, text: str) -> None:
    group.add_argument(name, action="store_true", help=text)


def _add_input(group: Any) -> None:
    group.add_argument(
        "--input", nargs="+", required=True, type=path_argument, metavar="FILE",
        help='Input in this order: files, folders, patterns ("a/*.jsonl"), - for standard input (JSON lines).',
    )  # fmt: skip
    group.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="Keys or columns to extract (text)."
    )
    group.add_argument(
        "--text-documents", choices=get_args(Reading.__annotations__["text_documents"]), default="blank-lines",
        help="What is a document in a .txt file: what stands between blank lines (default), a line, or the file.",
    )  # fmt: skip
    group.add_argument(
        "--max-line-mb", type=Range(1, 1e6, whole=False), default=MAX_LINE_BYTES / (1 << 20), metavar="N",
        help="A longer line or document is rejected unread, so that memory stays bounded (%(default).0f MiB).",
    )  # fmt: skip
    group.add_argument(
        "--on-error", choices=("fail", "skip", "report"), default="fail",
        help="A document that cannot be used ends the run (fail, default), is left out and counted (skip), or also "
        "listed with file, line and reason (report).",
    )  # fmt: skip
    group.add_argument("--skip-bad", dest="on_error", action="store_const", const="skip", help="As --on-error skip.")
    group.add_argument(
        "--reject-file", type=path_argument, metavar="F", help="List of what was left out (report: P.rejected)."
    )
    _switch(group, "--split-sentences", "Make each sentence a sequence (for BERT and T5); NLTK finds them.")
    _switch(group, "--keep-newlines", "With --split-sentences: keep what stands between sentences.")
    group.add_argument("--lang", default="english", metavar="L", help="Language of the sentences (english).")


def _add_cleaning(group: Any) -> None:
    _switch(
        group, "--clean",
        "Repair broken encodings (ftfy, if installed), line ends to LF, no control characters, Unicode NFC; bytes that "
        "are no UTF-8 become U+FFFD.",
    )  # fmt: skip
    _switch(group, "--redact-pii", "Put <EMAIL>, <IP_ADDRESS>, <PHONE_NUMBER> and <KEY> in place of such; counted.")
    group.add_argument("--min-chars", type=Range(0), metavar="N", help="Leave out texts with fewer characters.")
    group.add_argument("--max-chars", type=Range(1), metavar="N", help="Leave out texts with more characters.")
    group.add_argument("--dedup", choices=("exact",), help="Leave out texts equal to an earlier one of the same key.")


def _add_output(group: Any) -> None:
    group.add_argument(
        "--output-prefix",
        required=True,
        type=path_argument,
        metavar="P",
        help="Writes P_KEY_document.bin, .idx and .manifest.json.",
    )
    _switch(group, "--shuffle", "Write the documents in a seeded random order (for --sampling stream).")
    group.add_argument("--seed", type=Range(0, 2**64 - 1), default=1234, metavar="N", help="Seed of --shuffle (1234).")
    _switch(group, "--overwrite", "Replace datasets that exist.")


def _add_runtime(group: Any) -> None:
    group.add_argument("--workers", type=Range(1), metavar="N", help="Processes that tokenize (1).")
    _switch(group, "--mpi", "Work on the ranks of an MPI job: mpirun -n K megalm preprocess --mpi ..., or srun.")
    group.add_argument(
        "--log-interval", type=Range(1), metavar="N", help="Progress every N documents (default: by time)."
    )


def run(arguments: argparse.Namespace) -> int:
    """Preprocesses and prints a summary; under --mpi rank 0 does, and the others work for it.

    Raises:
        ConfigError: flags that do not make sense.
        DataError: input, tokenizer or output that cannot be used.
        PlatformError: a worker process died, or a package is missing.
    """
    import_modules(arguments.import_module)  # on every rank: each builds the tokenizer
    if arguments.mpi:
        communicator = mpi.world()
        with mpi.rank_workers(communicator) as executor:
            if executor is not None:
                print(preprocess(options_of(arguments), executor, max(1, communicator.size - 1)))
        return 0
    options = options_of(arguments)
    with local_workers(options.workers) as executor:
        print(preprocess(options, executor, options.workers))
    return 0


def options_of(arguments: argparse.Namespace) -> PreprocessOptions:
    """The checked options of the command line.

    Raises:
        ConfigError: every problem found.
    """
    found = _problems(arguments)
    tokenizer = tokenizer_config(arguments, found)
    if found:
        raise ConfigError(found)
    reading = Reading(
        keys=tuple(arguments.json_keys),
        max_line_bytes=int(arguments.max_line_mb * (1 << 20)),
        text_documents=arguments.text_documents,
        repair=arguments.clean,
    )
    reject_file = arguments.reject_file or (
        f"{arguments.output_prefix}.rejected" if arguments.on_error == "report" else None
    )
    same = (
        "output_prefix", "append_eod", "prepend_bos", "clean", "redact_pii", "min_chars", "max_chars",
        "split_sentences", "keep_newlines", "lang", "shuffle", "seed", "overwrite", "log_interval",
    )  # fmt: skip
    return PreprocessOptions(
        inputs=tuple(arguments.input),
        tokenizer=tokenizer,
        reading=reading,
        dedup=arguments.dedup is not None,
        skip_bad=arguments.on_error != "fail",
        reject_file=reject_file,
        fast_encoder=arguments.encoder == "auto",
        workers=arguments.workers or 1,
        **{name: getattr(arguments, name) for name in same},
    )


def _problems(arguments: argparse.Namespace) -> list[str]:
    found = []
    if None not in (arguments.min_chars, arguments.max_chars) and arguments.min_chars > arguments.max_chars:
        found.append(f"--min-chars {arguments.min_chars} is more than --max-chars {arguments.max_chars}")
    if arguments.reject_file is not None and arguments.on_error == "fail":
        found.append("--reject-file lists lines that are left out; add --on-error report")
    if arguments.keep_newlines and not arguments.split_sentences:
        found.append("--keep-newlines is about sentences; add --split-sentences")
    if arguments.mpi and arguments.workers is not None:
        found.append("--mpi makes each rank a worker; start more ranks in place of --workers")
    found += [
        f'--json-keys "{key}" becomes part of a file name, so it must not be empty or hold a "/"; rename the key'
        for key in arguments.json_keys
        if not key or "/" in key or "\0" in key
    ]
    for name, values in (("--input", arguments.input), ("--json-keys", arguments.json_keys)):
        if twice := [value for value, count in collections.Counter(values).items() if count > 1]:
            found.append(f"{name} names {', '.join(twice)} twice; name each once")
    return found
