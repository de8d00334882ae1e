"""The three ways in which Megatron uses a sentencepiece `.model`."""

import re
from collections.abc import Sequence

from megalm.data.tokenizers.base import first_line, identity_of, no_such_token, read_file
from megalm.data.tokenizers.tik_token import looks_like_tiktoken
from megalm.errors import DataError


class GPTSentencePieceTokenizer:
    """The model as it is: its pieces are all ids, and its end of sentence ends documents.

    Raises:
        DataError: the file is missing or not a sentencepiece model, or it lacks `eod_token`.
    """

    def __init__(self, path: str, eod_token: str | None = None) -> None:
        import sentencepiece

        content = read_file(path)
        self._model: sentencepiece.SentencePieceProcessor = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(content)
        except RuntimeError as error:
            advice = "give --tokenizer-type TikTokenizer" if looks_like_tiktoken(content) else "give a .model"
            raise DataError(f"{path} is not a sentencepiece model: {first_line(error)}; {advice}") from error
        self.path = path
        self.identity = identity_of(type(self).__name__, content)
        self.vocab_size = int(self._model.GetPieceSize())
        self.eod = _optional_id(self._model.eos_id())
        self.bos = _optional_id(self._model.bos_id())
        self.pad = _optional_id(self._model.pad_id())
        if eod_token is not None:
            self.eod = self._id_of(eod_token)

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

    def _id_of(self, token: str) -> int:
        found = int(self._model.PieceToId(token))
        if self._model.IdToPiece(found) != token:
            raise no_such_token(token, self.path)
        return found


class Llama2Tokenizer(GPTSentencePieceTokenizer):
    """The model as it is, with its begin of sentence before each text that is not empty, as Megatron does.

    Raises:
        DataError: as GPTSentencePieceTokenizer, and for a model without a begin of sentence.
    """

    def __init__(self, path: str, eod_token: str | None = None) -> None:
        super().__init__(path, eod_token)
        if self.bos is None:
            raise DataError(f"{path} has no begin of sentence; use --tokenizer-type GPTSentencePieceTokenizer")
        self._begin = [self.bos]

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
    of its own, then `extra_ids` tokens <extra_id_0>, ... Their names in a text stand for these tokens, and so do those
    of the model's own padding, begin and end of sentence.

    Raises:
        DataError: as GPTSentencePieceTokenizer.
    """

    def __init__(self, path: str, eod_token: str | None = None, extra_ids: int = 0) -> None:
        super().__init__(path)
        self._special: dict[str, int] = {}
        for name in ("<CLS>", "<SEP>", "<EOD>", "<MASK>"):
            self._add(name)
        self.pad, self.bos, _ = (
            self._add(name if own is None else self._model.IdToPiece(own))
            for name, own in (("<PAD>", self.pad), ("<BOS>", self.bos), ("<EOS>", self.eod))
        )
        for number in range(extra_ids):
            self._add(f"<extra_id_{number}>")
        self.eod = self._special["<EOD>"] if eod_token is None else self._id_of(eod_token)
        # an alternation finds the leftmost name and, of several there, the one that was added first
        self._names = re.compile("|".join(map(re.escape, self._special)))
        if extra_ids:
            self.identity = identity_of(self.identity, str(extra_ids).encode())

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

    def _add(self, name: str) -> int:
        found = int(self._model.PieceToId(name))
        if name in self._special:
            return self._special[name]
        if found >= 0 and self._model.IdToPiece(found) == name:
            self._special[name] = found
        else:
            self._special[name] = self.vocab_size
            self.vocab_size += 1
        return self._special[name]

    def _id_of(self, token: str) -> int:
        return self._special[token] if token in self._special else super()._id_of(token)


def _optional_id(number: int) -> int | None:
    return number if number >= 0 else None
