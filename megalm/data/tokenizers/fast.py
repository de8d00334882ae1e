"""The fast way from texts to ids: megalm's own encoder for sentencepiece models, gigatoken for others.

The library gets every text in which they could come out otherwise. What could: a text that spells a special or added
token; what a normalization changes (before gigatoken the tokenizer's own does it); characters that Unicode's versions
disagree about, where words are cut by classes of characters.
"""

import functools
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megalm.data.tokenizers.base import Tokenizer
from megalm.data.tokenizers.hugging_face import GPT2BPETokenizer, HFTokenizer
from megalm.data.tokenizers.pieces import piece_encoder
from megalm.data.tokenizers.sentence_piece import GPTSentencePieceTokenizer, Llama2Tokenizer
from megalm.data.tokenizers.tik_token import TikTokenizer

Ids = npt.NDArray[np.integer[Any]]
Lengths = npt.NDArray[np.int64]


class Encoder(Protocol):
    """Texts to ids."""

    def __call__(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        """The ids of all texts back to back, and the number of ids of each text."""


class FastEncoder:
    """Encodes fast what is then encoded as the library does, and with the library what else there is.

    Raises:
        ImportError: gigatoken is needed and not installed.
        Exception: whatever gigatoken raises for a tokenizer that it does not know.
    """

    def __init__(self, tokenizer: Tokenizer, library: Encoder) -> None:
        self._library = library
        self._ways = _ways_of(tokenizer, library)
        self.names = self._ways.names
        """What encodes, in words."""
        self._begin = tokenizer.special("bos") if isinstance(tokenizer, Llama2Tokenizer) else None
        names = {variant for name in special_texts(tokenizer) for variant in _variants(name)}
        self._differing = _differing(sorted(names), self._encode, library)
        self._names = re.compile("|".join(map(re.escape, self._differing)) or r"(?!)")
        self._beginnings = {name[0] for name in self._differing}

    def __call__(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        """The ids of all texts back to back, and the number of ids of each text."""
        special = [number for number, text in enumerate(texts) if self._spells_special(text)]
        if not special:
            return self._encode(texts)
        rest = sorted(set(range(len(texts))) - set(special))
        return _interleaved(
            len(texts),
            (rest, self._encode([texts[number] for number in rest])),
            (special, self._library([texts[number] for number in special])),
        )

    def _spells_special(self, text: str) -> bool:
        if not self._differing:
            return False
        # most texts hold no "<" at all: one look in place of one for each name
        return self._spelled(text) or (not text.isascii() and self._spelled(self._ways.shown(text)))

    def _spelled(self, text: str) -> bool:
        return any(first in text for first in self._beginnings) and self._names.search(text) is not None

    def _encode(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        """The ids, special tokens or not."""
        ids, lengths = _interleaved(len(texts), *self._ways.parts(texts))
        return (ids, lengths) if self._begin is None else _with_begin(ids, lengths, self._begin)


class _Ways:
    """Which texts are encoded how.

    Args:
        plain: how texts are encoded that no normalization changes.
        is_plain: which these are.
        other: how the others are encoded.
        shown: a text as the encoder gets it: there, too, a special token must not be spelled.
        names: what encodes, in words.
    """

    def __init__(
        self,
        plain: Encoder,
        is_plain: Callable[[str], bool],
        other: Encoder,
        shown: Callable[[str], str],
        names: str = "gigatoken",
    ) -> None:
        self._plain, self._is_plain, self._other, self.shown, self.names = plain, is_plain, other, shown, names

    def parts(self, texts: Sequence[str]) -> list[tuple[list[int], tuple[Ids, Lengths]]]:
        """(numbers of texts, their ids) of each way."""
        by_way: tuple[list[int], list[int]] = ([], [])
        for number, text in enumerate(texts):
            by_way[self._is_plain(text)].append(number)
        return [
            (numbers, encode([texts[number] for number in numbers]))
            for numbers, encode in zip(by_way, (self._other, self._plain), strict=True)
            if numbers
        ]


def _ways_of(tokenizer: Tokenizer, library: Encoder) -> _Ways:
    if isinstance(tokenizer, GPTSentencePieceTokenizer):
        return _sentencepiece_ways(tokenizer)
    from gigatoken import Tokenizer as Model

    if isinstance(tokenizer, HFTokenizer):
        return _hugging_face_ways(tokenizer, library)
    if isinstance(tokenizer, GPT2BPETokenizer):
        return _Ways(_Gigatoken(Model.from_json(tokenizer.to_json())), _is_assigned, library, str)
    if isinstance(tokenizer, TikTokenizer):
        model = Model.from_tiktoken(tokenizer.path, tokenizer.pattern, {})
        return _Ways(_Gigatoken(model), _is_assigned, library, str)
    raise TypeError(f"it is told nothing of {type(tokenizer).__name__}")


def _sentencepiece_ways(tokenizer: GPTSentencePieceTokenizer) -> _Ways:
    """All texts to megalm's own encoder; without it gigatoken gets them normalized, unless nothing changes them."""
    if (compiled := piece_encoder(tokenizer)) is not None:
        return _Ways(compiled, lambda text: True, compiled, str, "megalm's own, compiled")
    from gigatoken import Tokenizer as Model

    spec = tokenizer.proto().normalizer_spec
    plain = _Gigatoken(Model.from_sentencepiece(tokenizer.path))
    if not (spec.precompiled_charsmap or spec.remove_extra_whitespaces or spec.add_dummy_prefix):
        return _Ways(plain, lambda text: True, plain, str)
    if not spec.escape_whitespaces or tokenizer.proto().trainer_spec.treat_whitespace_as_suffix:
        raise TypeError("its blanks are not those of other models")
    # what is appended to a protocol message takes the place of what it says before
    own = _Gigatoken(Model.from_sentencepiece(tokenizer.content + _NO_NORMALIZATION))

    def normalized(texts: Sequence[str]) -> tuple[Ids, Lengths]:
        return own(tokenizer.normalize(texts))

    return _Ways(plain, _plain_where_equal(plain, normalized), normalized, lambda text: tokenizer.normalize([text])[0])


def _plain_where_equal(plain: Encoder, other: Encoder) -> Callable[[str], bool]:
    """Which texts go to `plain`: none where it differs from `other` on simple ones."""
    simple = [text for text in HARD_TEXTS if _is_simple(text)]
    return _is_simple if same_ids(plain(simple), other(simple)) else lambda text: False


_NO_NORMALIZATION = b"\x1a\x10\x0a\x08identity\x12\x00\x18\x00\x20\x00"
"""ModelProto.normalizer_spec = {name: "identity", precompiled_charsmap: "", add_dummy_prefix: false,
remove_extra_whitespaces: false} (sentencepiece_model.proto), as bytes."""


def _is_simple(text: str) -> bool:
    """Whether a text is of ASCII characters that gigatoken's own normalization leaves or takes for blanks."""
    if not text.isascii() or text.strip(" ") != text.strip():
        return False
    return text.replace("\n", "").replace("\r", "").replace("\t", "").isprintable()


def _hugging_face_ways(tokenizer: HFTokenizer, library: Encoder) -> _Ways:
    from gigatoken import Tokenizer as Model

    content = json.loads(tokenizer.to_json())
    kinds = set(_kinds(content.get("normalizer")))
    if not kinds or (kinds <= {"Prepend", "Replace"} and content["model"].get("byte_fallback")):
        # none, or sentencepiece's blanks, which gigatoken knows
        return _Ways(_Gigatoken(Model.from_json(tokenizer.to_json())), _is_assigned, library, str)
    content["normalizer"] = None
    own, normalize = _Gigatoken(Model.from_json(json.dumps(content))), tokenizer.normalize
    keeps_ascii = kinds <= {"NFC", "NFD", "NFKC", "NFKD"}

    def normalized(texts: Sequence[str]) -> tuple[Ids, Lengths]:
        return own([text if keeps_ascii and text.isascii() else normalize(text) for text in texts])

    return _Ways(normalized, _is_assigned, library, normalize)


def _kinds(normalizer: dict[str, Any] | None) -> Iterable[str]:
    """The types of a normalizer of a tokenizer.json and of its parts; a pattern is a type of its own."""
    if normalizer is None:
        return
    if normalizer["type"] == "Sequence":
        for part in normalizer["normalizers"]:
            yield from _kinds(part)
    else:
        yield "Regex" if "Regex" in normalizer.get("pattern", {}) else normalizer["type"]


class _Gigatoken:
    """gigatoken's model of a tokenizer, in one thread (worker processes are the parallelism)."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        if not texts:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        layout = self._model.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)


def _is_assigned(text: str) -> bool:
    """Whether every character has a class that all versions of Unicode since this Python's agree about."""
    if text.isascii():
        return True
    return not _unassigned().take(np.frombuffer(text.encode("utf-32-le"), np.uint32)).any()


@functools.cache
def _unassigned() -> npt.NDArray[np.bool_]:
    found = (unicodedata.category(chr(code)) == "Cn" for code in range(sys.maxunicode + 1))
    return np.fromiter(found, np.bool_, sys.maxunicode + 1)


PEER_NAMES = ("<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>", "<BOS>", "<EOS>")
"""Special tokens that Megatron adds to a model, which gigatoken does not know of."""


def special_texts(tokenizer: Tokenizer) -> set[str]:
    """What stands for a special or added token in a text, or could be taken for one."""
    if isinstance(tokenizer, GPTSentencePieceTokenizer):
        normal = tokenizer.proto().SentencePiece.Type.Value("NORMAL")
        pieces = {piece.piece for piece in tokenizer.proto().pieces if piece.type != normal}
        return pieces | set(PEER_NAMES) | set(tokenizer.added_names())
    if isinstance(tokenizer, HFTokenizer | GPT2BPETokenizer):
        content = json.loads(tokenizer.to_json())
        names = {token["content"] for token in content.get("added_tokens", [])}
        return names | {piece for piece in content["model"].get("vocab", {}) if _SPECIAL.fullmatch(piece)}
    return {"<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>"}


_SPECIAL = re.compile(r"<.+>|\[.+\]|.*\|.+\|.*", re.DOTALL)
"""Names as special tokens have them: <s>, [SEP], <|endoftext|>."""


def _variants(name: str) -> Iterable[str]:
    """A name, and what a text may hold for it where a normalization is between."""
    forms = {name} if name.isascii() else {unicodedata.normalize(form, name) for form in ("NFC", "NFD", "NFKC")}
    return {name, name.lower(), *forms}


_CONTEXTS = ("{}", "a{}b", "a {} b", " {} ", "{0}{0}", "\n{}\n", "1{}1", "\u00e9{}\u0301", "{}  {}")


def _differing(names: Sequence[str], encode: Encoder, library: Encoder) -> tuple[str, ...]:
    """The names that the two encode differently, alone or within a text."""
    texts = [context.replace("{0}", "{}").replace("{}", name) for name in names for context in _CONTEXTS]
    rows = (_rows(encode(texts)), _rows(library(texts)))
    equal = [np.array_equal(left, right) for left, right in zip(*rows, strict=True)]
    size = len(_CONTEXTS)
    return tuple(name for number, name in enumerate(names) if not all(equal[number * size : (number + 1) * size]))


def _rows(encoded: tuple[Ids, Lengths]) -> list[Ids]:
    ids, lengths = encoded
    ends = np.cumsum(lengths).tolist()
    return [ids[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]


def _with_begin(ids: Ids, lengths: Lengths, begin: int) -> tuple[Ids, Lengths]:
    """The ids with `begin` before each text that is not empty."""
    used = lengths > 0
    return np.insert(ids, (np.cumsum(lengths) - lengths)[used], begin), lengths + used


def _interleaved(total: int, *parts: tuple[list[int], tuple[Ids, Lengths]]) -> tuple[Ids, Lengths]:
    """The ids of `total` texts in order, from parts that hold the texts of the given numbers."""
    if len(parts) == 1:
        return parts[0][1]
    pieces: list[Ids] = [np.empty(0, np.int64)] * total
    for numbers, encoded in parts:
        for number, row in zip(numbers, _rows(encoded), strict=True):
            pieces[number] = row
    ids: Ids = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
    return ids, np.fromiter(map(len, pieces), dtype=np.int64, count=total)


def same_ids(left: tuple[Ids, Lengths], right: tuple[Ids, Lengths]) -> bool:
    """Whether two encoders have given the same."""
    return np.array_equal(left[1], right[1]) and np.array_equal(left[0], right[0])


HARD_TEXTS = (
    "", " ", " a", "a ", "  two  blanks  ", "\t\ttabs", "line\nline\r\n\r\n\n\nline", "\0\x01\x7f\x85", "\ufeffbom",
    "\u00a0\u2003\u200b\u200d", "caf\u00e9 cafe\u0301 \ufb01 \u01c6 \u1e9b\u0323", "\u0130i\u0131I \u00df\u1e9e",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3002 \ud55c\uad6d\uc5b4 \u4e2d\u6587",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001d54f", "\u2581\u2581a\u2581b",
    "\ufffd\ufffe\U0010ffff", "a" * 300, "=" * 200, "1234567890" * 20, "don't I'LL we've 'tis",
    "x=1;y[2]={'k':3.14e-5}  # c\n    return f(x)\n", "<s></s><unk><0x41><|endoftext|>[SEP]<EOD>a<CLS><pad>",
    "\uff76\uff9e\uff8a\uff9f \u1112\u1161\u11ab \u0915\u093c \u0301x \u00b4y", "\x1ca\x1db\u2028c\u3000d",
)  # fmt: skip
"""Texts in which encoders differ when they differ at all."""
