"""From a configuration to its tokenizer, or one error that says what to give."""

from pathlib import Path

from megalm.config.data import TokenizerConfig, TokenizerType
from megalm.data.tokenizers.base import Tokenizer, read_file
from megalm.data.tokenizers.hugging_face import GPT2BPETokenizer, HFTokenizer
from megalm.data.tokenizers.plain import ByteLevelTokenizer, NullTokenizer
from megalm.data.tokenizers.sentence_piece import GPTSentencePieceTokenizer, Llama2Tokenizer, SentencePieceTokenizer
from megalm.data.tokenizers.tik_token import TikTokenizer, looks_like_tiktoken
from megalm.errors import DataError

_MODEL_FILES: dict[TokenizerType, str] = {
    "GPTSentencePieceTokenizer": "a sentencepiece .model file",
    "SentencePieceTokenizer": "a sentencepiece .model file",
    "Llama2Tokenizer": "a sentencepiece .model file",
    "HFTokenizer": "a tokenizer.json",
    "TikTokenizer": "a tiktoken vocabulary",
}
"""Types that need --tokenizer-model, and what it must be."""

_TAKES: dict[str, tuple[TokenizerType, ...]] = {
    "tokenizer_model": tuple(_MODEL_FILES),
    "vocab_file": ("GPT2BPETokenizer",),
    "merge_file": ("GPT2BPETokenizer",),
    "tokenizer_vocab_size": ("NullTokenizer", "TikTokenizer"),
    "vocab_extra_ids": ("SentencePieceTokenizer",),
    "eod_token": (*_MODEL_FILES, "GPT2BPETokenizer"),
    "tiktoken_pattern": ("TikTokenizer",),
    "tiktoken_num_special_tokens": ("TikTokenizer",),
}
"""Setting -> the types that it means something to; with another type it is an error, never ignored."""


def open_tokenizer(config: TokenizerConfig) -> Tokenizer | None:
    """The tokenizer that the settings name; None if they name none."""
    return build_tokenizer(config) if config.is_given else None


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of `config`; its kind is told from its files when `tokenizer_type` is absent.

    Raises:
        DataError: nothing tells which tokenizer, a setting does not fit its type, or a file is missing or broken.
    """
    config = _with_files_of_folder(config)
    kind = config.tokenizer_type or _kind_of(config)
    for setting, kinds in _TAKES.items():
        value = getattr(config, setting)
        if value and kind not in kinds:
            flag = "--" + setting.replace("_", "-")
            raise DataError(
                f"{setting}={value} says nothing to {kind}, only to {' and '.join(kinds)}; leave out {flag}"
            )
    if kind in _MODEL_FILES:
        if config.tokenizer_model is None:
            raise DataError(f"tokenizer_type={kind} needs a file; give --tokenizer-model with {_MODEL_FILES[kind]}")
        return _of_model_file(kind, config.tokenizer_model, config)
    if kind == "ByteLevelTokenizer":
        return ByteLevelTokenizer()
    if kind == "NullTokenizer":
        if config.tokenizer_vocab_size is None:
            raise DataError("NullTokenizer needs the number of its ids; give --tokenizer-vocab-size")
        return NullTokenizer(config.tokenizer_vocab_size)
    if config.vocab_file is None or config.merge_file is None:
        raise DataError("GPT2BPETokenizer needs two files; give --vocab-file vocab.json and --merge-file merges.txt")
    return GPT2BPETokenizer(config.vocab_file, config.merge_file, config.eod_token)


def _of_model_file(kind: TokenizerType, path: str, config: TokenizerConfig) -> Tokenizer:
    if kind == "GPTSentencePieceTokenizer":
        return GPTSentencePieceTokenizer(path, config.eod_token)
    if kind == "Llama2Tokenizer":
        return Llama2Tokenizer(path, config.eod_token)
    if kind == "SentencePieceTokenizer":
        return SentencePieceTokenizer(path, config.eod_token, config.vocab_extra_ids or 0)
    if kind == "HFTokenizer":
        return HFTokenizer(path, config.eod_token)
    return TikTokenizer(
        path,
        config.eod_token,
        vocab_size=config.tokenizer_vocab_size,
        pattern=config.tiktoken_pattern,
        num_special=1000 if config.tiktoken_num_special_tokens is None else config.tiktoken_num_special_tokens,
    )


def _with_files_of_folder(config: TokenizerConfig) -> TokenizerConfig:
    """`config` with the file in the folder `tokenizer_model` in its place."""
    if config.tokenizer_model is None or not Path(config.tokenizer_model).is_dir():
        return config
    folder = Path(config.tokenizer_model)
    names = ["tokenizer.json", "tokenizer.model"]
    if config.tokenizer_type not in (None, "HFTokenizer"):
        names.reverse()
    for name in names:
        if (folder / name).is_file():
            return config.model_copy(update={"tokenizer_model": str(folder / name)})
    pair = folder / "vocab.json", folder / "merges.txt"
    if config.tokenizer_type in (None, "GPT2BPETokenizer") and all(path.is_file() for path in pair):
        files = {"tokenizer_model": None, "vocab_file": str(pair[0]), "merge_file": str(pair[1])}
        return config.model_copy(update=files)
    raise DataError(f"the folder {folder} holds no tokenizer.json and no tokenizer.model; give the file itself")


def _kind_of(config: TokenizerConfig) -> TokenizerType:
    path = config.tokenizer_model
    if path is None and (config.vocab_file or config.merge_file):
        return "GPT2BPETokenizer"
    if path is None:
        raise DataError(
            "no tokenizer is given; give --tokenizer-model FILE (a sentencepiece .model or a Hugging Face "
            "tokenizer.json), or --tokenizer-type ByteLevelTokenizer, which needs no file"
        )
    if path.endswith(".tiktoken"):
        return "TikTokenizer"
    if path.endswith(".model"):
        return "TikTokenizer" if looks_like_tiktoken(read_file(path)) else "GPTSentencePieceTokenizer"
    if path.endswith(".json"):
        return "TikTokenizer" if read_file(path).lstrip()[:1] == b"[" else "HFTokenizer"
    raise DataError(
        f"cannot tell the kind of tokenizer_model={path} from its name (.model, .json or .tiktoken); "
        "give --tokenizer-type GPTSentencePieceTokenizer, HFTokenizer or TikTokenizer"
    )
