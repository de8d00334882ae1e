"""Tokenizers that need no file: bytes, and ids as text."""

from collections.abc import Sequence

from megalm.data.tokenizers.base import identity_of
from megalm.errors import DataError


class ByteLevelTokenizer:
    """One id per byte of the UTF-8 text, and id 256 for end of document; loses nothing."""

    vocab_size = 257
    eod: int | None = 256
    bos: int | None = None
    pad: int | None = None

    def __init__(self) -> None:
        self.identity = identity_of("ByteLevelTokenizer", b"")

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts."""
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; bytes that are not UTF-8 (a cut character) give U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class NullTokenizer:
    """Text that is ids already, with blanks between: "17 4 4"; end of document is id `num_ids`."""

    def __init__(self, num_ids: int) -> None:
        self.vocab_size = num_ids + 1
        self.eod: int | None = num_ids
        self.bos: int | None = None
        self.pad: int | None = None
        self.identity = identity_of("NullTokenizer", str(num_ids).encode())

    def encode(self, text: str) -> list[int]:
        """The ids of one text.

        Raises:
            DataError: a word that is no id.
        """
        words = text.split()
        bad = next((w for w in words if not (w.isascii() and w.isdigit() and int(w) < self.vocab_size)), None)
        if bad is not None:
            raise DataError(f"NullTokenizer: {bad[:40]!r} is not an id in 0 .. {self.vocab_size - 1}")
        return [int(word) for word in words]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return " ".join(str(i) for i in ids if i != self.eod)
