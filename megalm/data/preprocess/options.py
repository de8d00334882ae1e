"""What `megalm preprocess` is asked to do."""

from dataclasses import dataclass, field
from pathlib import Path

from megalm.config.data import TokenizerConfig
from megalm.data.indexed.format import best_dtype
from megalm.data.preprocess.spec import ProcessingSpec
from megalm.data.text.formats import Reading
from megalm.data.tokenizers import Tokenizer
from megalm.errors import DataError


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """What to preprocess and how."""

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer: TokenizerConfig
    reading: Reading = field(default_factory=Reading)
    append_eod: bool = False
    prepend_bos: bool = False
    clean: bool = False
    redact_pii: bool = False
    min_chars: int | None = None
    max_chars: int | None = None
    split_sentences: bool = False
    keep_newlines: bool = False
    lang: str = "english"
    dedup: bool = False
    shuffle: bool = False
    seed: int = 1234
    skip_bad: bool = False
    """Leave out documents that cannot be used; False: the first one is an error."""
    reject_file: str | None = None
    fast_encoder: bool = True
    overwrite: bool = False
    workers: int = 1
    log_interval: int | None = None

    @property
    def level(self) -> str:
        """What a sequence of the dataset is; the end of its name."""
        return "sentence" if self.split_sentences else "document"

    def prefix_of(self, key: str) -> str:
        """Prefix of the dataset of one key."""
        return f"{self.output_prefix}_{key}_{self.level}"

    @property
    def prefixes(self) -> list[str]:
        """Prefixes of the datasets of all keys."""
        return [self.prefix_of(key) for key in self.reading.keys]

    @property
    def parts(self) -> Path:
        """Folder of what is finished of a run that is not."""
        return Path(f"{self.output_prefix}.parts")

    def spec(self, tokenizer: Tokenizer) -> ProcessingSpec:
        """What the workers do.

        Raises:
            DataError: a special token that the tokenizer has not, or sets itself.
        """
        if self.append_eod and tokenizer.special("eod") is None:
            raise DataError(
                "--append-eod needs a tokenizer with an end-of-document token; give --eod-token, or drop it"
            )
        if self.prepend_bos and tokenizer.special("bos") is None:
            raise DataError(
                "--prepend-bos needs a tokenizer with a begin-of-sequence token; this one has none: drop it"
            )
        if self.prepend_bos and tokenizer.encode("a")[:1] == [tokenizer.special("bos")]:
            raise DataError(
                f"--prepend-bos: {type(tokenizer).__name__} begins each text with its begin-of-sequence token itself, "
                "and there would be two; drop it"
            )
        same = (
            "tokenizer", "reading", "append_eod", "prepend_bos", "clean", "redact_pii", "min_chars", "max_chars",
            "split_sentences", "keep_newlines", "lang",
        )  # fmt: skip
        dtype = best_dtype(tokenizer.vocab_size).name
        return ProcessingSpec(dtype=dtype, digests=self.dedup, **{name: getattr(self, name) for name in same})
