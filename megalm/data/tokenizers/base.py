"""What every tokenizer offers, and what they share: special tokens, reading files, identities, errors."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import ClassVar, Protocol, Self

from megalm.config.data import TokenizerConfig
from megalm.config.merging.suggest import did_you_mean
from megalm.errors import DataError
from megalm.storage.faults import files_beside, reason_of

SPECIAL_NAMES: Mapping[str, tuple[str, ...]] = {
    "eod": ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]"),
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "[CLS]"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "pad": ("<pad>", "[PAD]", "<|pad|>"),
    "unk": ("<unk>", "[UNK]"),
    "mask": ("<mask>", "[MASK]", "<MASK>"),
    "cls": ("<cls>", "[CLS]", "<CLS>"),
    "sep": ("<sep>", "[SEP]", "<SEP>"),
    "fim_prefix": ("<fim_prefix>", "<|fim_prefix|>", "<PRE>", "\u2581<PRE>", "<fim-prefix>"),
    "fim_middle": ("<fim_middle>", "<|fim_middle|>", "<MID>", "\u2581<MID>", "<fim-middle>"),
    "fim_suffix": ("<fim_suffix>", "<|fim_suffix|>", "<SUF>", "\u2581<SUF>", "<fim-suffix>"),
    "mode_r": ("[R]", "<R>", "[NLU]"),
    "mode_s": ("[S]", "<S>", "[S2S]"),
    "mode_x": ("[X]", "<X>", "[NLG]"),
}
"""What a special token is asked for by: end of document, begin and end of sequence, padding, unknown, mask, first of a
text, between texts, around the parts of a document (FIM), in front of a denoiser's text (UL2); and the tokens that are
taken for it, the first that a vocabulary has. The sentinels <extra_id_0>, ... are asked for by extra_id_0, ..."""
BY_NAME = ("mask", "cls", "sep", "fim_prefix", "fim_middle", "fim_suffix", "mode_r", "mode_s", "mode_x")
"""Those of which no vocabulary says more than their names."""


BYTE_LEVEL_BLANKS = tuple(chr(0x100 + byte) for byte in b" \t\n\r")
"""Blank, tab and line ends in GPT-2's spelling of bytes."""


class Tokenizer(Protocol):
    """Text to ids and back; the class is an entry of `TOKENIZERS`."""

    settings: ClassVar[tuple[str, ...]] = ()
    """Settings of TokenizerConfig that mean something to it; with another one given it is an error, never ignored."""

    vocab_size: int
    """Number of ids: 0 .. vocab_size - 1, special ones too."""
    identity: str
    """SHA-256 of type and files: equal for tokenizers that give equal ids."""
    special_ids: dict[str, int]
    """Ids of the special tokens that it has, by their names in SPECIAL_NAMES."""

    @classmethod
    def build(cls, config: TokenizerConfig) -> Self:
        """The tokenizer that the settings describe.

        Raises:
            DataError: a setting or file is missing or broken.
        """

    @classmethod
    def recognises(cls, path: str) -> bool:
        """Whether the file `path`, given as tokenizer_model without a type, is one of this kind."""
        return False

    def special(self, name: str) -> int | None:
        """The id of a special token ("eod", "mask", ...); None if there is none."""
        return self.special_ids.get(name)

    def token_id(self, token: str) -> int | None:
        """The id of a token by its spelling; None: there is none, or its tokens have no spelling."""
        return None

    def word_starts(self) -> list[bool] | None:
        """Whether a token begins a word, by id; None: nothing tells."""
        return None

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, in one thread (worker processes are the parallelism)."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens give no text."""


def starts_of_words(tokens: Sequence[str], inside: str | None = None) -> list[bool] | None:
    """Whether each token begins a word: it has no prefix `inside`, or a blank before it; None: no token has either.

    Blanks are U+2581 (sentencepiece), or a blank, tab or line end as byte-level BPE spells them.
    """
    if inside is not None:
        return [not token.startswith(inside) for token in tokens]
    for blanks in (("\u2581",), BYTE_LEVEL_BLANKS):
        if any(token.startswith(blanks) for token in tokens):
            return [token.startswith(blanks) for token in tokens]
    return None


def special_tokens(
    id_of: Callable[[str], int | None], names: Iterable[str], first: Mapping[str, str | None] | None = None
) -> dict[str, int]:
    """The ids of the special tokens `names` in a vocabulary: of the token that `first` names, else of SPECIAL_NAMES."""
    found = {}
    for name in names:
        tokens = ((first or {}).get(name), *SPECIAL_NAMES[name])
        ids = (id_of(token) for token in tokens if token is not None)
        number = next((i for i in ids if i is not None), None)
        if number is not None:
            found[name] = number
    return found | sentinels(id_of)


def sentinels(id_of: Callable[[str], int | None]) -> dict[str, int]:
    """The ids of <extra_id_0>, ... by name (extra_id_0, ...), up to the first that a vocabulary lacks."""
    ids = ((f"extra_id_{number}", id_of(f"<extra_id_{number}>")) for number in count())
    return {name: number for name, number in takewhile(lambda pair: pair[1] is not None, ids) if number is not None}


class AddedTokens:
    """Tokens by name that a tokenizer has besides its vocabulary: those that this lacks take the ids after it.

    Args:
        id_of: the vocabulary's own id of a token; None if it has none.
    """

    def __init__(self, vocab_size: int, id_of: Callable[[str], int | None]) -> None:
        self.vocab_size = vocab_size
        """Ids with those that were added."""
        self.ids: dict[str, int] = {}
        self._id_of = id_of

    def add(self, token: str) -> int:
        """The id of `token`, which is the next one if nobody has the token yet."""
        if token not in self.ids:
            own = self._id_of(token)
            self.ids[token] = self.vocab_size if own is None else own
            self.vocab_size += own is None
        return self.ids[token]


def model_file(config: TokenizerConfig, kind: str, what: str) -> str:
    """The file of --tokenizer-model, which a tokenizer of this kind needs.

    Raises:
        DataError: it is not given.
    """
    if config.tokenizer_model is None:
        raise DataError(f"tokenizer_type={kind} needs a file; give --tokenizer-model with {what}")
    return config.tokenizer_model


def read_file(path: str, setting: str = "tokenizer_model") -> bytes:
    """The content of a tokenizer's file, which the user named in `setting`.

    Raises:
        DataError: it cannot be read.
    """
    try:
        if Path(path).is_char_device():  # it may have no end
            raise DataError(f"{setting}={path} is a device; it must be a file on this machine")
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read {setting}={path}: {reason_of(error, path)}; it must be a file on this machine"
            + did_you_mean(path, files_beside(path))
        ) from error


def no_such_token(token: str, path: str) -> DataError:
    """The error for an --eod-token that the tokenizer lacks."""
    return DataError(f'eod_token="{token}" is no token of {path}; give one that is, or leave out --eod-token')


def identity_of(kind: str, *contents: bytes) -> str:
    """SHA-256 of a type and what determines its ids."""
    return hashlib.sha256(b"\0".join([kind.encode(), *contents])).hexdigest()


def first_line(error: BaseException) -> str:
    """What a library says of a broken file or a text that it refuses, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
