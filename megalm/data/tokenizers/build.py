"""From a configuration to its tokenizer, or one error that says what to give."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from megalm.config.data import TokenizerConfig
from megalm.data.tokenizers.base import Tokenizer
from megalm.data.tokenizers.extra import from_the_end
from megalm.data.tokenizers.hugging_face import GPT2BPETokenizer, HFTokenizer
from megalm.data.tokenizers.plain import ByteLevelTokenizer, NullTokenizer
from megalm.data.tokenizers.sentence_piece import GPTSentencePieceTokenizer, Llama2Tokenizer, SentencePieceTokenizer
from megalm.data.tokenizers.tik_token import TikTokenizer
from megalm.errors import DataError
from megalm.storage.faults import reading
from megalm.tables import Table

_KINDS: tuple[type[Tokenizer], ...] = (
    GPTSentencePieceTokenizer, SentencePieceTokenizer, Llama2Tokenizer, HFTokenizer, NullTokenizer, TikTokenizer,
    GPT2BPETokenizer, ByteLevelTokenizer,
)  # fmt: skip
TOKENIZERS: Table[type[Tokenizer]] = Table("tokenizer_type", {kind.__name__: kind for kind in _KINDS})
"""Value of --tokenizer-type -> the tokenizer. Without a type it is the first one that recognises the file."""


def open_tokenizer(config: TokenizerConfig) -> Tokenizer | None:
    """The tokenizer that the settings name; None if they name none."""
    return build_tokenizer(config) if config.is_given else None


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of `config`; its kind is told from its files when `tokenizer_type` is absent.

    Raises:
        DataError: nothing tells which tokenizer, a setting does not fit its type, or a file is missing or broken.
        ConfigError: there is no such type.
    """
    config = _with_files_of_folder(config)
    name = config.tokenizer_type or _kind_of(config)
    kind = TOKENIZERS[name]
    if config.vocab_extra_ids and "vocab_extra_ids" not in kind.settings:
        return WithExtraIds.build(config)
    for setting in TokenizerConfig.model_fields:
        value = getattr(config, setting)
        if value and setting != "tokenizer_type" and setting not in kind.settings:
            kinds = " and ".join(other for other in TOKENIZERS if setting in TOKENIZERS[other].settings)
            flag = "--" + setting.replace("_", "-")
            raise DataError(f"{setting}={value} says nothing to {name}, only to {kinds}; leave out {flag}")
    return kind.build(config)


class WithExtraIds(Tokenizer):
    """`base` with `count` more ids: <extra_id_0>, ..., of which the last stand for what `base` lacks.

    Texts have the same ids as without them, so that data of the one is data of the other: the identity is `base`'s.
    """

    def __init__(self, base: Tokenizer, count: int) -> None:
        self.base = base
        extra = range(base.vocab_size, base.vocab_size + count)
        self.vocab_size, self.identity = extra.stop, base.identity
        sentinels = {f"extra_id_{number}": id for number, id in enumerate(extra)}
        self.special_ids = base.special_ids | sentinels | from_the_end(base.special_ids, extra)

    @classmethod
    def build(cls, config: TokenizerConfig) -> Self:
        """The tokenizer of the other settings, with --vocab-extra-ids."""
        return cls(build_tokenizer(config.model_copy(update={"vocab_extra_ids": None})), config.vocab_extra_ids or 0)

    @property
    def extra_names(self) -> list[str]:
        """The tokens after those of `base`, in their order."""
        return [f"<extra_id_{number}>" for number in range(self.vocab_size - self.base.vocab_size)]

    def token_id(self, token: str) -> int | None:
        """The id of a token."""
        return self.special_ids.get(token[1:-1]) if token in self.extra_names else self.base.token_id(token)

    def word_starts(self) -> list[bool] | None:
        """As `base`; what is added begins none."""
        starts = self.base.word_starts()
        return starts and starts + [False] * len(self.extra_names)

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.base.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, in one thread."""
        return self.base.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; those that are added give none."""
        return self.base.decode([i for i in ids if i < self.base.vocab_size])

    def __getattr__(self, name: str) -> Any:
        """What only some tokenizers have (`token`, ...)."""
        if name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)


def _with_files_of_folder(config: TokenizerConfig) -> TokenizerConfig:
    """`config` with the file in the folder `tokenizer_model` instead of the folder."""
    if config.tokenizer_model is None:
        return config
    folder = Path(config.tokenizer_model)
    with reading(folder, DataError, "give this process the right to read it, or another --tokenizer-model"):
        return _with_files_of(folder, config) if folder.is_dir() else config


def _with_files_of(folder: Path, config: TokenizerConfig) -> TokenizerConfig:
    names = ["tokenizer.json", "tokenizer.model", "tekken.json", "qwen.tiktoken"]
    if config.tokenizer_type not in (None, "HFTokenizer"):
        names = names[1:] + names[:1]
    for name in names:
        if (folder / name).is_file():
            return config.model_copy(update={"tokenizer_model": str(folder / name)})
    pair = folder / "vocab.json", folder / "merges.txt"
    if config.tokenizer_type in (None, "GPT2BPETokenizer") and all(path.is_file() for path in pair):
        files = {"tokenizer_model": None, "vocab_file": str(pair[0]), "merge_file": str(pair[1])}
        return config.model_copy(update=files)
    raise DataError(f"the folder {folder} holds no tokenizer.json and no tokenizer.model; give the file itself")


def _kind_of(config: TokenizerConfig) -> str:
    path = config.tokenizer_model
    if path is None and (config.vocab_file or config.merge_file):
        return GPT2BPETokenizer.__name__
    if path is None:
        raise DataError(
            "no tokenizer is given; give --tokenizer-model FILE (a sentencepiece .model or a Hugging Face "
            "tokenizer.json), or --tokenizer-type ByteLevelTokenizer, which needs no file"
        )
    for name, kind in TOKENIZERS.items():
        if kind.recognises(path):
            return name
    raise DataError(
        f"cannot tell the kind of tokenizer_model={path} from its name (.model, .json or .tiktoken); "
        "give --tokenizer-type GPTSentencePieceTokenizer, HFTokenizer or TikTokenizer"
    )
