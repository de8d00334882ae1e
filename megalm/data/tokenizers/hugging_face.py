"""Tokenizers of Hugging Face's `tokenizers`: a tokenizer.json, or GPT-2's vocab.json and merges.txt."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalm.data.tokenizers.base import first_line, identity_of, no_such_token, read_file
from megalm.errors import DataError

if TYPE_CHECKING:
    import tokenizers

EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "[CLS]")
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>")


class HFTokenizer:
    """A Hugging Face `tokenizer.json`; needs no network.

    End of document is `eod_token`, else the eos_token of a tokenizer_config.json beside the file, else the first of
    `EOD_NAMES` that it holds; likewise begin of sequence and padding. Added tokens are found in a text, as
    `transformers` does.

    Raises:
        DataError: the file is missing or not a tokenizer, or it lacks `eod_token`.
    """

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
        self.eod = self._first((eod_token,) if eod_token is not None else (beside.get("eos_token"), *EOD_NAMES))
        self.bos = self._first((beside.get("bos_token"), *BOS_NAMES))
        self.pad = self._first((beside.get("pad_token"), *PAD_NAMES))
        if eod_token is not None and self.eod is None:
            raise no_such_token(eod_token, path)

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, in one thread."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)

    def to_json(self) -> str:
        """The content of a tokenizer.json that gives the same ids."""
        return self._model.to_str()

    def _first(self, names: Sequence[str | None]) -> int | None:
        found = (self._model.token_to_id(name) for name in names if name is not None)
        return next((i for i in found if i is not None), None)


class GPT2BPETokenizer:
    """GPT-2's byte-level BPE from its vocab.json and merges.txt; end of document is <|endoftext|> or `eod_token`.

    Raises:
        DataError: a file is missing or broken, they do not belong together, or there is no end of document.
    """

    bos: int | None = None
    pad: int | None = None

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
        self.eod: int | None = eod

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, in one thread."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; end of document gives none."""
        return self._model.decode([int(i) for i in ids if i != self.eod], skip_special_tokens=False)

    def to_json(self) -> str:
        """The content of a tokenizer.json that gives the same ids."""
        return self._model.to_str()


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
    """The special tokens that a tokenizer_config.json names; none if there is no such file.

    Raises:
        DataError: the file is broken.
    """
    if not path.is_file():
        return {}
    try:
        content: Any = json.loads(path.read_bytes())
        named = {key: content[key] for key in ("eos_token", "bos_token", "pad_token") if content.get(key)}
        return {key: token if isinstance(token, str) else token["content"] for key, token in named.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
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
