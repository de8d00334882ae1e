"""The work of one preprocessing worker: a chunk of lines in, token ids ready for the disk out."""

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.config.data import TokenizerConfig
from megalm.data.readers import Chunk, Rejected, format_of
from megalm.data.tokenizers import Tokenizer, build_tokenizer
from megalm.errors import DataError


@dataclass(frozen=True)
class Encoding:
    """How texts become ids; hashable and small, since it travels with every chunk."""

    tokenizer: TokenizerConfig
    json_keys: tuple[str, ...]
    append_eod: bool
    dtype: str


@dataclass(frozen=True)
class EncodedKey:
    """The documents of one key in one chunk."""

    tokens: npt.NDArray[np.integer[Any]]
    """Back to back, in the dtype of the dataset."""
    lengths: npt.NDArray[np.int32]
    """Tokens of each document that is not empty."""
    num_empty: int
    text_bytes: int


@dataclass(frozen=True)
class EncodedChunk:
    """What became of a chunk."""

    keys: tuple[EncodedKey, ...]
    rejected: tuple[Rejected, ...]


@functools.lru_cache(maxsize=1)
def tokenizer_of(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of `config`, built once a process; forked workers inherit the main process's."""
    return build_tokenizer(config)


def encode_chunk(encoding: Encoding, chunk: Chunk) -> EncodedChunk:
    """The ids of every document of `chunk`, per key, in order.

    Raises:
        DataError: a text that the tokenizer refuses, or an id outside its vocabulary.
    """
    documents: list[tuple[str, ...]] = []
    rejected: list[Rejected] = []
    for document in format_of(chunk.path).documents(chunk, encoding.json_keys):
        if isinstance(document, Rejected):
            rejected.append(document)
        else:
            documents.append(document)
    tokenizer = tokenizer_of(encoding.tokenizer)
    keys = tuple(
        _encode_texts(tokenizer, [document[column] for document in documents], encoding)
        for column in range(len(encoding.json_keys))
    )
    return EncodedChunk(keys, tuple(rejected))


def _encode_texts(tokenizer: Tokenizer, texts: list[str], encoding: Encoding) -> EncodedKey:
    documents = [ids for ids in tokenizer.encode_batch(texts) if ids]
    if encoding.append_eod:
        assert tokenizer.eod is not None, "checked before the workers start"
        for ids in documents:
            ids.append(tokenizer.eod)
    lengths = np.fromiter(map(len, documents), dtype=np.int32, count=len(documents))
    tokens = np.fromiter(itertools.chain.from_iterable(documents), dtype=np.int32, count=int(lengths.sum()))
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < tokenizer.vocab_size:
        raise DataError(
            f"the tokenizer gave ids {tokens.min()} .. {tokens.max()} outside its vocabulary of "
            f"{tokenizer.vocab_size}; its file is inconsistent, give another --tokenizer-model"
        )
    return EncodedKey(
        tokens=tokens.astype(encoding.dtype),
        lengths=lengths,
        num_empty=len(texts) - len(documents),
        text_bytes=sum(len(text) if text.isascii() else len(text.encode()) for text in texts),
    )
