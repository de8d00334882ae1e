"""Tokenizers that need no file: bytes, and ids as text."""

from collections.abc import Sequence
from typing import ClassVar, Self

from megalm.config.data import TokenizerConfig
from megalm.data.tokenizers.base import Tokenizer, identity_of
from megalm.errors import DataError


class ByteLevelTokenizer(Tokenizer):
    """One id per byte of the UTF-8 text, and id 256 for end of document; loses nothing."""

    vocab_size = 257

    def __init__(self) -> None:
        self.special_ids = {"eod": 256}
        self.identity = identity_of("ByteLevelTokenizer", b"")

    @classmethod
    def build(cls, config: TokenizerConfig) -> Self:
        """The tokenizer, which needs no settings."""
        return cls()

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return list(text.encode())

    def word_starts(self) -> list[bool]:
        """Blanks begin the word after them, as in byte-level BPE."""
        return [number in b" \t\n\r" for number in range(256)] + [False]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; bytes that are not UTF-8 (a cut character) give U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class NullTokenizer(Tokenizer):
    """Text that is ids already, with blanks between: "17 4 4"; end of document is id `num_ids`."""

    settings: ClassVar[tuple[str, ...]] = ("tokenizer_vocab_size",)

    def __init__(self, num_ids: int) -> None:
        self.vocab_size = num_ids + 1
        self.special_ids = {"eod": num_ids}
        self.identity = identity_of("NullTokenizer", str(num_ids).encode())

    @classmethod
    def build(cls, config: TokenizerConfig) -> Self:
        """The tokenizer of --tokenizer-vocab-size ids.

        Raises:
            DataError: it is not given.
        """
        if config.tokenizer_vocab_size is None:
            raise DataError("NullTokenizer needs the number of its ids; give --tokenizer-vocab-size")
        return cls(config.tokenizer_vocab_size)

    def encode(self, text: str) -> list[int]:
        """The ids of one text.

        Raises:
            DataError: a word that is no id.
        """
        words = text.split()
        bad = next((word for word in words if not self._is_id(word)), None)
        if bad is not None:
            raise DataError(f"NullTokenizer: {bad[:40]!r} is not an id in 0 .. {self.vocab_size - 1}")
        return [int(word.lstrip("0") or "0") for word in words]

    def _is_id(self, word: str) -> bool:
        digits = word.lstrip("0") or "0"  # Python reads no number of thousands of digits
        return word.isascii() and word.isdigit() and len(digits) < 20 and int(digits) < self.vocab_size

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return " ".join(str(i) for i in ids if i != self.special_ids["eod"])
