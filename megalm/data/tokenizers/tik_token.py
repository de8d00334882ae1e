"""tiktoken vocabularies: Megatron's JSON layout, and the BPE files of OpenAI and Llama 3."""

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from megalm.config.data import TokenizerConfig
from megalm.data.tokenizers.base import (
    BY_NAME,
    Tokenizer,
    first_line,
    identity_of,
    model_file,
    no_such_token,
    read_file,
    special_tokens,
)
from megalm.errors import DataError, PlatformError

_CASED_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+ENDING"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*ENDING"
    r"|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PATTERNS = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": _CASED_WORDS.replace("ENDING", "").replace("DIGITS", r"\p{N}"),
    "r50k": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": _CASED_WORDS.replace("ENDING", _CONTRACTION + "?").replace("DIGITS", r"\p{N}{1,3}"),
    "llama3": _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen": _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""How a text is cut into words before BPE: Megatron's two (v1, v2), OpenAI's, Llama 3's and Qwen's."""


@dataclass(frozen=True)
class _Known:
    """A published vocabulary, told by its number of ranks: its pattern, special tokens, and all its ids."""

    pattern: str
    special: dict[str, int]
    vocab_size: int


_KNOWN = {
    50256: _Known("r50k", {"<|endoftext|>": 50256}, 50257),
    50280: _Known("r50k", {"<|endoftext|>": 50256}, 50281),
    100256: _Known("cl100k", {"<|endoftext|>": 100257}, 100277),
    199998: _Known("o200k", {"<|endoftext|>": 199999}, 200019),
    128000: _Known("llama3", {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001}, 128256),
    200000: _Known("o200k", {"<|begin_of_text|>": 200000, "<|end_of_text|>": 200001}, 202048),
    151643: _Known("qwen", {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}, 151851),
}
"""OpenAI's r50k_base, p50k_base, cl100k_base and o200k_base, Llama 3, Llama 4 and Qwen."""

_SPECIAL_FIRST = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
_MAX_VOCAB = 2**17
"""Megatron's --vocab-size of a TikTokenizer when none is given."""
_Ranks = dict[bytes, int]


class TikTokenizer(Tokenizer):
    """A tiktoken BPE vocabulary of one of three layouts; the names of special tokens in a text are text.

    Megatron's JSON, a list of {"rank", "token_bytes" (base64), "token_str"}: ids start with `num_special` special
    tokens, <unk>, <s>, </s> (end of document), <mask>, <pad>, <cls>, <sep> and unnamed ones; then the first ranks, up
    to `vocab_size` ids in all. Mistral's tekken.json: the same with a pattern, sizes and names of its own. A BPE file
    (lines "base64 rank", as cl100k_base.tiktoken or Llama 3's tokenizer.model): ids are ranks; a known vocabulary has
    its own special tokens and pattern, told by its number of ranks, another gets <|endoftext|> as its last id.

    Raises:
        DataError: the file is missing or damaged, it lacks `eod_token`, a size or pattern does not fit it.
        PlatformError: `tiktoken` is not installed.
    """

    settings: ClassVar[tuple[str, ...]] = (
        "tokenizer_model", "tokenizer_vocab_size", "eod_token", "tiktoken_pattern", "tiktoken_num_special_tokens",
    )  # fmt: skip

    def __init__(
        self,
        path: str,
        eod_token: str | None = None,
        *,
        vocab_size: int | None = None,
        pattern: str | None = None,
        num_special: int = 1000,
    ) -> None:
        content = read_file(path)
        if looks_like_tekken(content):
            ranks, special, self.vocab_size, pattern = _tekken_vocabulary(path, content)
            eod = "</s>"
        elif content.lstrip()[:1] == b"[":
            ranks, special, self.vocab_size = _megatron_vocabulary(path, content, vocab_size, num_special)
            eod, pattern = "</s>", pattern or "v2"
        else:
            ranks = _bpe_ranks(path, content)
            known = _known(path, ranks, pattern)
            special, self.vocab_size, pattern = known.special, known.vocab_size, known.pattern
            eod = next(name for name in ("<|endoftext|>", "<|end_of_text|>") if name in special)
        self.path, self.pattern = path, pattern
        self._model = _encoding(path, ranks, special, PATTERNS.get(pattern, pattern))
        if eod_token is not None and eod_token not in special:
            raise no_such_token(eod_token, path)
        self._special, self._named = frozenset(special.values()), special
        self.special_ids = special_tokens(special.get, ("bos", "eos", "pad", "unk", *BY_NAME))
        self.special_ids["eod"] = special[eod if eod_token is None else eod_token]
        self.identity = identity_of(
            "TikTokenizer", content, f"{pattern} {self.vocab_size} {min(ranks.values())}".encode()
        )

    @classmethod
    def build(cls, config: TokenizerConfig) -> Self:
        """The tokenizer of the vocabulary file."""
        special = config.tiktoken_num_special_tokens
        return cls(
            model_file(config, cls.__name__, "a tiktoken vocabulary"),
            config.eod_token,
            vocab_size=config.tokenizer_vocab_size,
            pattern=config.tiktoken_pattern,
            num_special=1000 if special is None else special,
        )

    @classmethod
    def recognises(cls, path: str) -> bool:
        """A .tiktoken, a .model of lines "base64 rank", a .json that is a list, a tekken.json."""
        if path.endswith(".model"):
            return looks_like_tiktoken(read_file(path))
        if not path.endswith(".json"):
            return path.endswith(".tiktoken")
        content = read_file(path)
        return content.lstrip()[:1] == b"[" or looks_like_tekken(content)

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        ids: list[int] = self._model.encode_ordinary(text)
        return ids

    def token_id(self, token: str) -> int | None:
        """The id of a special token."""
        return self._named.get(token)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, in one thread."""
        return [self._model.encode_ordinary(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; bytes that are not UTF-8 (a cut character) give U+FFFD."""
        text: str = self._model.decode([int(i) for i in ids if i not in self._special])
        return text


def looks_like_tiktoken(content: bytes) -> bool:
    """Whether the first line of a file is "base64 rank"."""
    words = content[:200].split(b"\n", 1)[0].split()
    return len(words) == 2 and words[1] == b"0" and words[0].isascii()


def looks_like_tekken(content: bytes) -> bool:
    """Whether a file is Mistral's tekken.json."""
    return content.lstrip()[:1] == b"{" and b'"default_num_special_tokens"' in content


def _tekken_vocabulary(path: str, content: bytes) -> tuple[_Ranks, dict[str, int], int, str]:
    """Ranks and special tokens as ids, the number of all ids, and the pattern.

    Source: mistral-common, tokens/tokenizers/tekken.py: special tokens first, then as many ranks as fill the size.
    """
    try:
        parsed = json.loads(content)
        config = parsed["config"]
        pattern, size, count = config["pattern"], config["default_vocab_size"], config["default_num_special_tokens"]
        named = {entry["token_str"]: entry["rank"] for entry in parsed.get("special_tokens") or ()}
        tokens = [base64.b64decode(entry["token_bytes"], validate=True) for entry in parsed["vocab"]]
        special = named or {name: number for number, name in enumerate(("<unk>", "<s>", "</s>"))}
        inside = all(type(number) is int and 0 <= number < count for number in special.values())
        if not (isinstance(pattern, str) and inside and count + 256 <= size <= count + len(tokens)):
            raise ValueError("its sizes do not fit each other")
        ends = "</s>" in special
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is not a tekken.json ({first_line(error)}); copy it again") from error
    if not ends:
        raise DataError(f"{path} has no </s> to end documents; copy it again")
    return {token: count + rank for rank, token in enumerate(tokens[: size - count])}, special, size, pattern


def _encoding(path: str, ranks: _Ranks, special: dict[str, int], pattern: str) -> Any:
    try:
        import tiktoken
    except ImportError as error:
        raise PlatformError("TikTokenizer needs the tiktoken package; pip install tiktoken") from error

    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise DataError(f"{path} lacks {len(missing)} of the 256 single bytes; give the whole vocabulary")
    try:
        return tiktoken.Encoding(path, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    except ValueError as error:
        raise DataError(f"{path} is no vocabulary for tiktoken ({first_line(error)}); copy it again") from error


def _megatron_vocabulary(
    path: str, content: bytes, vocab_size: int | None, num_special: int
) -> tuple[_Ranks, dict[str, int], int]:
    """Ranks and special tokens as ids, and the number of all ids."""
    if num_special < len(_SPECIAL_FIRST):
        raise DataError(f"tiktoken_num_special_tokens={num_special} must be {len(_SPECIAL_FIRST)} or more")
    try:
        entries = json.loads(content)
        tokens = [base64.b64decode(entry["token_bytes"], validate=True) for entry in entries]
        ordered = all(entry["rank"] == number for number, entry in enumerate(entries))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a tiktoken vocabulary in JSON ({first_line(error)}); give a list of "
            '{"rank", "token_bytes", "token_str"}'
        ) from error
    if not ordered or tokens[:256] != [bytes([byte]) for byte in range(256)] or len(set(tokens)) < len(tokens):
        raise DataError(
            f"{path} must hold ranks 0, 1, ... in order, the 256 bytes first, each token once; copy it again"
        )
    most = len(tokens) + num_special
    size = min(most, _MAX_VOCAB) if vocab_size is None else vocab_size
    if not num_special + 256 <= size <= most:
        raise DataError(
            f"{path} has {len(tokens)} tokens and {num_special} special ones: --vocab-size {size} must be "
            f"{num_special + 256} to {most}"
        )
    names = [*_SPECIAL_FIRST, *(f"<SPECIAL_{number}>" for number in range(len(_SPECIAL_FIRST), num_special))]
    ranks = {token: num_special + rank for rank, token in enumerate(tokens[: size - num_special])}
    return ranks, {name: number for number, name in enumerate(names)}, size


def _bpe_ranks(path: str, content: bytes) -> _Ranks:
    ranks: _Ranks = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(
                f"{path}, line {number}: {line[:40]!r} is not a token in base64 and its rank; give a tiktoken BPE file"
            ) from error
    if not ranks or min(ranks.values()) < 0 or len(set(ranks.values())) < len(ranks):
        raise DataError(f"{path} must hold tokens with different ranks; give a tiktoken BPE file")
    return ranks


def _known(path: str, ranks: _Ranks, pattern: str | None) -> _Known:
    known = _KNOWN.get(len(ranks))
    if known is not None and pattern in (None, known.pattern) and known.vocab_size > max(ranks.values()):
        return known
    if pattern is None:
        raise DataError(
            f"{path} holds {len(ranks)} tokens, which is no known vocabulary; say how its text is cut into words: "
            f"--tiktoken-pattern with one of {', '.join(PATTERNS)}"
        )
    end = max(ranks.values()) + 1
    return _Known(pattern, {"<|endoftext|>": end}, end + 1)
