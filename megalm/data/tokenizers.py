"""Tokenizers behind one small face: text to ids and back, with what a run must know about them.

No tokenizer adds tokens by itself (no BOS, no end of document); who writes documents does that.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megalm.config.data import TokenizerConfig, TokenizerType
from megalm.config.suggest import did_you_mean
from megalm.errors import DataError

if TYPE_CHECKING:
    pass


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
        """SHA-256 of type and model file: equal for tokenizers that give equal ids."""

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, in one thread (worker processes are the parallelism)."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens give no text."""


class SentencePieceTokenizer:
    """A sentencepiece `.model`.

    Raises:
        DataError: the file is missing or not a sentencepiece model, or it lacks `eod_token`.
    """

    def __init__(self, path: str, eod_token: str | None = None) -> None:
        import sentencepiece

        content = _read(path)
        self._model: sentencepiece.SentencePieceProcessor = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise DataError(f"{path} is not a sentencepiece model: {_first_line(error)}; give a .model") from error
        self.identity = _identity("SentencePieceTokenizer", content)
        self.vocab_size = int(self._model.GetPieceSize())
        self.eod = _optional_id(self._model.eos_id()) if eod_token is None else self._id_of(eod_token, path)
        self.bos = _optional_id(self._model.bos_id())
        self.pad = _optional_id(self._model.pad_id())

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        ids: list[int] = self._model.EncodeAsIds(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, in one thread."""
        ids: list[list[int]] = self._model.Encode(list(texts), out_type=int, num_threads=1)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        text: str = self._model.Decode([int(i) for i in ids])
        return text

    def _id_of(self, token: str, path: str) -> int:
        found = int(self._model.PieceToId(token))
        if self._model.IdToPiece(found) != token:
            raise _no_such_token(token, path)
        return found


class HFTokenizer:
    """A Hugging Face `tokenizer.json`; end of document is `eod_token` or the first known name that it holds.

    Raises:
        DataError: the file is missing or not a tokenizer, or it lacks `eod_token`.
    """

    EOD_NAMES = ("<|endoftext|>", "</s>", "<eos>", "[SEP]")
    BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "[CLS]")
    PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>")

    def __init__(self, path: str, eod_token: str | None = None) -> None:
        import tokenizers

        content = _read(path)
        try:
            self._model: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception for every broken file
            raise DataError(
                f"{path} is not a Hugging Face tokenizer; give a tokenizer.json ({_first_line(error)})"
            ) from error
        # A stored limit would cut documents, stored padding would add tokens to them.
        self._model.no_truncation()
        self._model.no_padding()
        self.identity = _identity("HFTokenizer", content)
        # The highest id, not the number of tokens: ids may have gaps.
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eod = self._first((eod_token,) if eod_token is not None else self.EOD_NAMES)
        self.bos = self._first(self.BOS_NAMES)
        self.pad = self._first(self.PAD_NAMES)
        if eod_token is not None and self.eod is None:
            raise _no_such_token(eod_token, path)

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, in one thread."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)

    def _first(self, names: Sequence[str]) -> int | None:
        found = (self._model.token_to_id(name) for name in names)
        return next((i for i in found if i is not None), None)


class ByteLevelTokenizer:
    """One id per byte of the UTF-8 text, and id 256 for end of document; needs no file, loses nothing."""

    vocab_size = 257
    eod: int | None = 256
    bos: int | None = None
    pad: int | None = None

    def __init__(self) -> None:
        self.identity = _identity("ByteLevelTokenizer", b"")

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
        self.identity = _identity("NullTokenizer", str(num_ids).encode())

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


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of `config`; its kind is told from the file name when `tokenizer_type` is absent.

    Raises:
        DataError: nothing tells which tokenizer, or its file is missing or broken.
    """
    model = None if config.tokenizer_model is None else _model_file(config.tokenizer_model)
    kind = config.tokenizer_type or _kind_of(model)
    if kind == "ByteLevelTokenizer":
        return ByteLevelTokenizer()
    if kind == "NullTokenizer":
        if config.tokenizer_vocab_size is None:
            raise DataError("NullTokenizer needs the number of its ids; give --tokenizer-vocab-size")
        return NullTokenizer(config.tokenizer_vocab_size)
    if model is None:
        wanted = "sentencepiece .model file" if kind == "SentencePieceTokenizer" else "tokenizer.json"
        raise DataError(f"tokenizer_type={kind} needs a file; give --tokenizer-model with a {wanted}")
    of_file: dict[TokenizerType, Callable[[str, str | None], Tokenizer]] = {
        "SentencePieceTokenizer": SentencePieceTokenizer,
        "HFTokenizer": HFTokenizer,
    }
    return of_file[kind](model, config.eod_token)


def _kind_of(model: str | None) -> TokenizerType:
    if model is None:
        raise DataError(
            "no tokenizer is given; give --tokenizer-model FILE (a sentencepiece .model or a Hugging Face "
            "tokenizer.json), or --tokenizer-type ByteLevelTokenizer, which needs no file"
        )
    if model.endswith(".model"):
        return "SentencePieceTokenizer"
    if model.endswith(".json"):
        return "HFTokenizer"
    raise DataError(
        f"cannot tell the kind of tokenizer_model={model} from its name (.model or .json); "
        "give --tokenizer-type SentencePieceTokenizer or HFTokenizer"
    )


def _model_file(name: str) -> str:
    """`name`, or the tokenizer file in the folder `name`."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    for file in ("tokenizer.json", "tokenizer.model"):
        if (folder / file).is_file():
            return str(folder / file)
    raise DataError(f"the folder {name} holds no tokenizer.json and no tokenizer.model; give the file itself")


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        folder = Path(path).parent
        near = sorted(str(p) for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
        raise DataError(
            f"cannot read tokenizer_model={path}: {error.strerror}; it must be a file on this machine"
            + did_you_mean(path, near)
        ) from error


def _no_such_token(token: str, path: str) -> DataError:
    return DataError(f'eod_token="{token}" is no token of {path}; give one that is, or leave out --eod-token')


def _identity(kind: str, content: bytes) -> str:
    return hashlib.sha256(kind.encode() + b"\0" + content).hexdigest()


def _optional_id(number: int) -> int | None:
    return number if number >= 0 else None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
