"""What every tokenizer offers, and what they share: reading files, identities, errors."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megalm.config.merging.suggest import did_you_mean
from megalm.errors import DataError


class Tokenizer(Protocol):
    """Text to ids and back. `vocab_size` counts all ids, special ones too; None stands for a token that is absent."""

    @property
    def vocab_size(self) -> int:
        """Number of ids: 0 .. vocab_size - 1."""

    @property
    def eod(self) -> int | None:
        """End of document."""

    @property
    def bos(self) -> int | None:
        """Begin of sequence."""

    @property
    def pad(self) -> int | None:
        """Padding."""

    @property
    def identity(self) -> str:
        """SHA-256 of type and files: equal for tokenizers that give equal ids."""

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, in one thread (worker processes are the parallelism)."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens give no text."""


def read_file(path: str, setting: str = "tokenizer_model") -> bytes:
    """The content of a tokenizer's file, which the user named in `setting`.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        folder = Path(path).parent
        near = sorted(str(p) for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
        raise DataError(
            f"cannot read {setting}={path}: {error.strerror}; it must be a file on this machine"
            + did_you_mean(path, near)
        ) from error


def no_such_token(token: str, path: str) -> DataError:
    """The error for an --eod-token that the tokenizer lacks."""
    return DataError(f'eod_token="{token}" is no token of {path}; give one that is, or leave out --eod-token')


def identity_of(kind: str, *contents: bytes) -> str:
    """SHA-256 of a type and what determines its ids."""
    return hashlib.sha256(b"\0".join([kind.encode(), *contents])).hexdigest()


def first_line(error: Exception) -> str:
    """What a library says of a broken file, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
