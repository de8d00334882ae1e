"""`megalm train-tokenizer`: a sentencepiece model from JSON lines, lossless for any text but U+2581.

Text is taken as it is: no normalisation, no added or removed blanks, runs of blanks and line ends may be tokens, and
what no token covers becomes bytes. (sentencepiece stores a blank as U+2581, so that character comes back as a blank.)
"""

import argparse
import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megalm import __version__
from megalm.config.paths import path_argument
from megalm.config.ranges import Range
from megalm.data.text.formats import Reading, Rejected
from megalm.data.text.input_file import InputFile
from megalm.data.text.inputs import expand
from megalm.data.tools.corpus import is_up_to_date, write_manifest
from megalm.errors import DataError
from megalm.storage.atomic import atomic_write
from megalm.storage.durable import sha256_of

TRAINING_BYTES = {"bpe": 24_000_000, "unigram": 2_000_000}
"""Characters to learn from at most, spread over the input: about 5 s on two cores with either."""
BLOCK_BYTES = 4000
"""Length of one training sentence; several lines, so that line ends are learned with what is around them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `megalm train-tokenizer`."""
    parser.description = (
        "Train a sentencepiece tokenizer (P.model): BPE or unigram, no normalisation, bytes for what no piece covers."
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        type=path_argument,
        metavar="FILE",
        help="Text, as for preprocess: files, folders, patterns.",
    )
    parser.add_argument("--json-key", default="text", metavar="KEY", help="Key that holds the text (text).")
    parser.add_argument("--output-prefix", required=True, type=path_argument, metavar="P", help="Writes P.model.")
    parser.add_argument("--vocab-size", type=Range(1), default=4096, metavar="N", help="Number of ids (4096).")
    parser.add_argument("--model-type", choices=sorted(TRAINING_BYTES), default="bpe", help="Algorithm (bpe).")


def run(arguments: argparse.Namespace) -> int:
    """Trains the tokenizer, or says that it is up to date.

    Raises:
        DataError: input that cannot be used, or a vocabulary that does not fit it.
    """
    output = Path(f"{arguments.output_prefix}.model")
    inputs = [InputFile(path) for path in expand(arguments.input).files]
    if not all(file.is_regular for file in inputs):
        raise DataError("--input must name files, which are read twice; write standard input to a file first")
    request = {
        "megalm": __version__,
        "inputs": [sha256_of(file.path) for file in inputs],
        "json_key": arguments.json_key,
        "vocab_size": arguments.vocab_size,
        "model_type": arguments.model_type,
    }
    if is_up_to_date(output, request):
        print(f"{output} is up to date")
        return 0
    texts = _Counted(text for file in inputs for text in _texts(file, arguments.json_key))
    blocks = training_blocks(texts, TRAINING_BYTES[arguments.model_type])
    if not blocks:
        raise DataError(f"{', '.join(arguments.input)} hold no text; give input with text")
    model = train(blocks, vocab_size=arguments.vocab_size, model_type=arguments.model_type)
    with atomic_write(output) as stream:
        stream.write(model)
    write_manifest(output, request, hashlib.sha256(model).hexdigest())
    size = f"{texts.characters / 1e6:.1f} million characters"
    print(f"{output}: {arguments.model_type}, {arguments.vocab_size:,} ids, from {size}")
    return 0


class _Counted(Iterator[str]):
    """Texts, and how many characters have gone by."""

    def __init__(self, texts: Iterator[str]) -> None:
        self._texts, self.characters = texts, 0

    def __next__(self) -> str:
        text = next(self._texts)
        self.characters += len(text)
        return text


def train(texts: Iterable[str], *, vocab_size: int, model_type: str = "bpe") -> bytes:
    """The content of a sentencepiece `.model`; the same texts and options give the same bytes.

    Ids: 0 <unk>, 1 <s>, 2 </s> (end of document), then 256 bytes, then pieces.

    Raises:
        DataError: `vocab_size` does not fit the text.
    """
    import sentencepiece

    writer = io.BytesIO()
    options: dict[str, Any] = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "allow_whitespace_only_pieces": True,
        "byte_fallback": True,
        "character_coverage": 0.9999,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        "max_sentence_length": 4 * BLOCK_BYTES,
        "num_threads": 2,  # fixed: unigram sums floats per thread
        "minloglevel": 2,
    }
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(training_blocks(texts, TRAINING_BYTES[model_type])),
            model_writer=writer,  # not a file name, which would become part of the model
            vocab_size=vocab_size,
            model_type=model_type,
            **options,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip()
        reason = re.sub(r" or (decrease|increase) \S+ with --\S+ option", "", reason)  # flags that are not ours
        raise DataError(f"--vocab-size {vocab_size} does not fit this text: {reason or error}") from error
    return writer.getvalue()


def training_blocks(texts: Iterable[str], limit: int) -> list[str]:
    """Blocks of whole lines where possible, at most `limit` characters of them, evenly spread over `texts`.

    Reads `texts` once and holds no more than it returns: when they are too many, every second one goes.
    """
    kept: list[str] = []
    size, stride = 0, 1
    for number, block in enumerate(block for text in texts for block in _blocks(text)):
        if number % stride:
            continue
        kept.append(block)
        size += len(block)
        while size > limit and len(kept) > 1:
            kept = kept[::2]
            stride, size = 2 * stride, sum(map(len, kept))
    return kept


def _blocks(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        stop = min(len(text), start + BLOCK_BYTES)
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def _texts(file: InputFile, key: str) -> Iterator[str]:
    for found in file.documents(Reading(keys=(key,))):
        if isinstance(found, Rejected):
            raise DataError(f"{found}; correct the line")
        yield found.texts[0]
