"""The three ways in which Megatron uses a sentencepiece `.model`."""

import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

from megalm.config.data import TokenizerConfig
from megalm.data.tokenizers.base import (
    BY_NAME,
    AddedTokens,
    Tokenizer,
    first_line,
    identity_of,
    model_file,
    no_such_token,
    read_file,
    sentinels,
    special_tokens,
    starts_of_words,
)
from megalm.data.tokenizers.extra import from_the_end
from megalm.data.tokenizers.tik_token import looks_like_tiktoken
from megalm.errors import DataError


class GPTSentencePieceTokenizer(Tokenizer):
    """The model as it is: its pieces are all ids, and its end of sentence ends documents.

    Raises:
        DataError: the file is missing or not a sentencepiece model, or it lacks `eod_token`.
    """

    settings: ClassVar[tuple[str, ...]] = ("tokenizer_model", "eod_token")

    def __init__(self, path: str, eod_token: str | None = None) -> None:
        import sentencepiece

        content = read_file(path)
        self._model: sentencepiece.SentencePieceProcessor = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(content)
        except RuntimeError as error:
            advice = "give --tokenizer-type TikTokenizer" if looks_like_tiktoken(content) else "give a .model"
            raise DataError(f"{path} is not a sentencepiece model: {first_line(error)}; {advice}") from error
        self.path, self.content = path, content
        self.identity = identity_of(type(self).__name__, content)
        self.vocab_size = int(self._model.GetPieceSize())
        self.special_ids = self._own_special()
        if eod_token is not None:
            self.special_ids["eod"] = self._id_of(eod_token)

    @classmethod
    def build(cls, config: TokenizerConfig) -> Self:
        """The tokenizer of the model file."""
        return cls(model_file(config, cls.__name__, "a sentencepiece .model file"), config.eod_token)

    @classmethod
    def recognises(cls, path: str) -> bool:
        """Every .model that is not one of tiktoken's."""
        return path.endswith(".model") and not looks_like_tiktoken(read_file(path))

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

    def token(self, number: int) -> str:
        """The piece with this id."""
        return str(self._model.IdToPiece(number))

    def token_id(self, token: str) -> int | None:
        """The id of a piece."""
        return self._piece(token)

    def word_starts(self) -> list[bool] | None:
        """By the blanks before words; tokens after the pieces are none."""
        pieces = int(self._model.GetPieceSize())
        starts = starts_of_words([self._model.IdToPiece(i) for i in range(pieces)])
        return starts and starts + [False] * (self.vocab_size - pieces)

    def encode_arrays(self, texts: Sequence[str]) -> list[Any]:
        """The ids of several texts, in one thread: arrays, or lists where this sentencepiece gives none."""
        try:
            arrays: list[Any] = self._model.Encode(list(texts), num_threads=1, return_type="numpy")
            return arrays
        except TypeError:  # before 0.2.3
            return list(self.encode_batch(texts))

    def normalize(self, texts: Sequence[str]) -> list[str]:
        """The texts in which the model looks for its pieces, with U+2581 for blanks."""
        normal: list[str] = self._model.Normalize(list(texts))
        return normal

    def added_names(self) -> Iterable[str]:
        """Names in a text that stand for tokens besides the model's pieces."""
        return ()

    @functools.cached_property
    def _proto(self) -> Any:
        from sentencepiece import sentencepiece_model_pb2

        return sentencepiece_model_pb2.ModelProto.FromString(self.content)

    def proto(self) -> Any:
        """The model as sentencepiece's protocol message (ModelProto)."""
        return self._proto

    def _own_special(self) -> dict[str, int]:
        """What the model says of itself, and pieces that are named as special tokens are."""
        model = self._model
        own = {"eod": model.eos_id(), "eos": model.eos_id(), "bos": model.bos_id(), "pad": model.pad_id()}
        own |= {"unk": model.unk_id()}
        return {name: int(i) for name, i in own.items() if i >= 0} | special_tokens(self._piece, BY_NAME)

    def _piece(self, token: str) -> int | None:
        """The id of a piece; None if the model has no such piece."""
        found = int(self._model.PieceToId(token))
        return found if found >= 0 and self._model.IdToPiece(found) == token else None

    def _id_of(self, token: str) -> int:
        found = self._piece(token)
        if found is None:
            raise no_such_token(token, self.path)
        return found


class Llama2Tokenizer(GPTSentencePieceTokenizer):
    """The model as it is, with its begin of sentence before each text that is not empty, as Megatron does.

    Raises:
        DataError: as GPTSentencePieceTokenizer, and for a model without a begin of sentence.
    """

    def __init__(self, path: str, eod_token: str | None = None) -> None:
        super().__init__(path, eod_token)
        if "bos" not in self.special_ids:
            raise DataError(f"{path} has no begin of sentence; use --tokenizer-type GPTSentencePieceTokenizer")
        self._begin = [self.special_ids["bos"]]

    def encode(self, text: str) -> list[int]:
        """The ids of one text, begin of sentence first."""
        ids = super().encode(text)
        return self._begin + ids if ids else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, in one thread."""
        return [self._begin + ids if ids else ids for ids in super().encode_batch(texts)]


class SentencePieceTokenizer(GPTSentencePieceTokenizer):
    """The model with Megatron's special tokens after its pieces, each unless it is a piece already.

    In this order: <CLS>, <SEP>, <EOD> (end of document), <MASK>, then <PAD>, <BOS> and <EOS> where the model has none
    of its own, then `extra_ids` tokens <extra_id_0>, ..., the last of which stand for what is lacking still. Their
    names in a text stand for these tokens, and so do those of the model's own padding, begin and end of sentence.

    Raises:
        DataError: as GPTSentencePieceTokenizer.
    """

    settings: ClassVar[tuple[str, ...]] = ("tokenizer_model", "vocab_extra_ids", "eod_token")

    def __init__(self, path: str, eod_token: str | None = None, extra_ids: int = 0) -> None:
        super().__init__(path)
        added, own = AddedTokens(self.vocab_size, self._piece), self.special_ids
        special = {name: added.add(f"<{name.upper()}>") for name in ("cls", "sep", "eod", "mask")}
        for name in ("pad", "bos", "eos"):
            special[name] = added.add(self._model.IdToPiece(own[name]) if name in own else f"<{name.upper()}>")
        for number in range(extra_ids):
            added.add(f"<extra_id_{number}>")
        special |= sentinels(lambda token: added.ids.get(token, self._piece(token)))
        extra = [special[f"extra_id_{number}"] for number in range(extra_ids)]
        self._special, self.vocab_size = added.ids, added.vocab_size
        self.special_ids = own | special | from_the_end(own | special, extra)
        if eod_token is not None:
            self.special_ids["eod"] = self._id_of(eod_token)
        # an alternation finds the leftmost name and, of several there, the one that was added first
        self._names = re.compile("|".join(map(re.escape, self._special)))
        if extra_ids:
            self.identity = identity_of(self.identity, str(extra_ids).encode())

    @classmethod
    def build(cls, config: TokenizerConfig) -> Self:
        """The tokenizer of the model file, with --vocab-extra-ids."""
        path = model_file(config, cls.__name__, "a sentencepiece .model file")
        return cls(path, config.eod_token, config.vocab_extra_ids or 0)

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, in one thread."""
        parts, names = [], []
        for text in texts:
            parts.append(self._names.split(text))
            names.append(self._names.findall(text))
        encoded = iter(super().encode_batch([part for text in parts for part in text]))
        rows = []
        for found in names:
            ids = next(encoded)
            for name in found:
                ids = [*ids, self._special[name], *next(encoded)]
            rows.append(ids)
        return rows

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens give none."""
        special = set(self._special.values())
        return super().decode([i for i in ids if i not in special])

    def added_names(self) -> Iterable[str]:
        """Names in a text that stand for tokens besides the model's pieces."""
        return self._special

    def token_id(self, token: str) -> int | None:
        """The id of a piece, or of a token after them."""
        return self._special.get(token, self._piece(token))

    def _id_of(self, token: str) -> int:
        return self._special[token] if token in self._special else super()._id_of(token)
