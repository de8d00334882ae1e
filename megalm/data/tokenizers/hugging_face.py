"""Tokenizers of Hugging Face's `tokenizers`: a tokenizer.json, or GPT-2's vocab.json and merges.txt."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from megalm.config.data import TokenizerConfig
from megalm.data.tokenizers.base import (
    BY_NAME,
    SPECIAL_NAMES,
    Tokenizer,
    first_line,
    identity_of,
    model_file,
    no_such_token,
    read_file,
    special_tokens,
    starts_of_words,
)
from megalm.data.tokenizers.tik_token import TikTokenizer
from megalm.errors import DataError
from megalm.storage.documents import parse_json

if TYPE_CHECKING:
    import tokenizers


class HFTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`; needs no network.

    End of document is `eod_token`, else the eos_token of a tokenizer_config.json beside the file, else the first of
    `SPECIAL_NAMES["eod"]` that it holds; likewise the other special tokens. Added tokens are found in a text, as
    `transformers` does.

    Raises:
        DataError: the file is missing or not a tokenizer, or it lacks `eod_token`.
    """

    settings: ClassVar[tuple[str, ...]] = ("tokenizer_model", "eod_token")

    def __init__(self, path: str, eod_token: str | None = None) -> None:
        import tokenizers

        content = read_file(path)
        try:
            self._model: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception for every broken file
            advice = _advice(content)
            raise DataError(f"{path} is not a Hugging Face tokenizer; {advice} ({first_line(error)})") from error
        # A stored limit would cut documents, stored padding would add tokens to them.
        self._model.no_truncation()
        self._model.no_padding()
        self.identity = identity_of("HFTokenizer", content)
        self.vocab_size = _vocab_size(self._model)
        beside = _read_names(Path(path).with_name("tokenizer_config.json"))
        for name, token in beside.items():
            if self._model.token_to_id(token) is None and not (name in ("eod", "eos") and eod_token is not None):
                raise DataError(
                    f'{path} has no token "{token}", which tokenizer_config.json beside it names as its '
                    f"{'eos' if name == 'eod' else name}_token; correct the name there, or take it out"
                )
        self.special_ids = special_tokens(self._model.token_to_id, SPECIAL_NAMES, beside)
        if eod_token is not None:
            chosen = self._model.token_to_id(eod_token)
            if chosen is None:
                raise no_such_token(eod_token, path)
            self.special_ids["eod"] = chosen

    @classmethod
    def build(cls, config: TokenizerConfig) -> Self:
        """The tokenizer of the file."""
        return cls(model_file(config, cls.__name__, "a tokenizer.json"), config.eod_token)

    @classmethod
    def recognises(cls, path: str) -> bool:
        """Every .json that is not one of tiktoken's."""
        return path.endswith(".json") and not TikTokenizer.recognises(path)

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)

    def to_json(self) -> str:
        """The content of a tokenizer.json that gives the same ids."""
        return self._model.to_str()

    def token(self, number: int) -> str:
        """The token with this id."""
        return str(self._model.id_to_token(number))

    def token_id(self, token: str) -> int | None:
        """The id of a token."""
        return self._model.token_to_id(token)

    def word_starts(self) -> list[bool] | None:
        """By WordPiece's prefix of tokens inside words, else by the blanks before words."""
        model = json.loads(self.to_json())["model"]
        prefix = model.get("continuing_subword_prefix") if model.get("type") == "WordPiece" else None
        return starts_of_words([self._model.id_to_token(i) or "" for i in range(self.vocab_size)], prefix)

    def normalize(self, text: str) -> str:
        """The text in which the model looks for its tokens."""
        normalizer = self._model.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)


class GPT2BPETokenizer(Tokenizer):
    """GPT-2's byte-level BPE from its vocab.json and merges.txt; end of document is <|endoftext|> or `eod_token`.

    Raises:
        DataError: a file is missing or broken, they do not belong together, or there is no end of document.
    """

    settings: ClassVar[tuple[str, ...]] = ("vocab_file", "merge_file", "eod_token")

    def __init__(self, vocab_file: str, merge_file: str, eod_token: str | None = None) -> None:
        vocab_content, merge_content = read_file(vocab_file, "vocab_file"), read_file(merge_file, "merge_file")
        vocab = _read_vocab(vocab_file, vocab_content)
        merges = _read_merges(merge_file, merge_content, vocab, vocab_file)
        self._model = _byte_level_bpe(vocab, merges)
        self.identity = identity_of("GPT2BPETokenizer", vocab_content, merge_content)
        self.vocab_size = _vocab_size(self._model)
        eod = vocab.get("<|endoftext|>" if eod_token is None else eod_token)
        if eod is None and eod_token is not None:
            raise no_such_token(eod_token, vocab_file)
        if eod is None:
            raise DataError(f'vocab_file={vocab_file} has no "<|endoftext|>"; name its end of document: --eod-token')
        self.special_ids = special_tokens(vocab.get, ("unk", *BY_NAME)) | {"eod": eod}

    @classmethod
    def build(cls, config: TokenizerConfig) -> Self:
        """The tokenizer of the two files.

        Raises:
            DataError: one is not given.
        """
        if config.vocab_file is None or config.merge_file is None:
            raise DataError(
                "GPT2BPETokenizer needs two files; give --vocab-file vocab.json and --merge-file merges.txt"
            )
        return cls(config.vocab_file, config.merge_file, config.eod_token)

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; end of document gives none."""
        return self._model.decode([int(i) for i in ids if i != self.special_ids["eod"]], skip_special_tokens=False)

    def to_json(self) -> str:
        """The content of a tokenizer.json that gives the same ids."""
        return self._model.to_str()

    def token(self, number: int) -> str:
        """The token with this id."""
        return str(self._model.id_to_token(number))

    def token_id(self, token: str) -> int | None:
        """The id of a token."""
        return self._model.token_to_id(token)

    def word_starts(self) -> list[bool] | None:
        """By the blanks before words."""
        return starts_of_words([self._model.id_to_token(i) or "" for i in range(self.vocab_size)])


def _byte_level_bpe(vocab: dict[str, int], merges: list[tuple[str, str]]) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    model = Tokenizer(models.BPE(vocab, merges))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return model


def _read_vocab(path: str, content: bytes) -> dict[str, int]:
    from tokenizers import pre_tokenizers

    rule = "it must be GPT-2's vocab.json, an object of tokens and their ids"
    try:
        vocab = json.loads(content)
    except ValueError as error:
        raise DataError(f"vocab_file={path} is not JSON ({first_line(error)}); {rule}") from error
    if not isinstance(vocab, dict) or not all(type(i) is int and i >= 0 for i in vocab.values()):
        raise DataError(f"vocab_file={path} holds something else than tokens and ids; {rule}")
    if len(set(vocab.values())) < len(vocab):
        raise DataError(f"vocab_file={path} gives one id to several tokens; {rule}")
    missing = [symbol for symbol in pre_tokenizers.ByteLevel.alphabet() if symbol not in vocab]
    if missing:
        raise DataError(
            f"vocab_file={path} lacks {len(missing)} of the 256 bytes, so it would lose text; give the vocab.json of a "
            "byte-level BPE"
        )
    return vocab


def _read_merges(path: str, content: bytes, vocab: dict[str, int], vocab_file: str) -> list[tuple[str, str]]:
    try:
        lines = content.decode().split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"merge_file={path} is not text ({error}); give GPT-2's merges.txt") from error
    merges = []
    for number, line in enumerate(lines, 1):
        pair = line.removesuffix("\r").split(" ")
        if line.startswith("#version") or pair == [""]:
            continue
        if len(pair) != 2:
            raise DataError(f"merge_file={path}, line {number}: {line[:40]!r} is not a pair of tokens; give merges.txt")
        absent = next((token for token in (*pair, "".join(pair)) if token not in vocab), None)
        if absent is not None:
            raise DataError(
                f"merge_file={path}, line {number}: {absent[:40]!r} is no token of vocab_file={vocab_file}; "
                "give two files of one tokenizer"
            )
        merges.append((pair[0], pair[1]))
    return merges


def _vocab_size(model: "tokenizers.Tokenizer") -> int:
    """The highest id + 1, not the number of tokens: ids may have gaps."""
    return max(model.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _read_names(path: Path) -> dict[str, str]:
    """The special tokens that a tokenizer_config.json names, by name; none if there is no such file.

    Its eos_token ends documents.

    Raises:
        DataError: the file is broken.
    """
    if not path.is_file():
        return {}
    try:
        content: Any = parse_json(read_file(str(path), "tokenizer_config"), repeats=True)
        keys = {name: f"{name}_token" for name in SPECIAL_NAMES} | {"eod": "eos_token"}
        named = {name: content[key] for name, key in keys.items() if content.get(key)}
        names = {name: token if isinstance(token, str) else token["content"] for name, token in named.items()}
        if wrong := [name for name, token in names.items() if not isinstance(token, str)]:
            raise TypeError(f"its {keys[wrong[0]]} is no text")
        return names
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is broken ({first_line(error)}); copy it again, or remove it") from error


def _advice(content: bytes) -> str:
    """What to give in place of a file that is no tokenizer.json."""
    try:
        parsed = json.loads(content)
    except ValueError:
        return "give a tokenizer.json"
    if isinstance(parsed, list):
        return "a vocabulary in Megatron's tiktoken layout needs --tokenizer-type TikTokenizer"
    if isinstance(parsed, dict) and parsed and all(isinstance(value, int) for value in parsed.values()):
        return "a vocab.json is given with its merges.txt: --vocab-file and --merge-file"
    return "give a tokenizer.json"
