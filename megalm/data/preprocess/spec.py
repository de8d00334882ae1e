"""What happens to each document between file and token ids; travels to the workers."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from megalm import __version__
from megalm.config.data import TokenizerConfig
from megalm.data.preprocess.filters import clean, redact, sentences
from megalm.data.text.formats import Reading
from megalm.data.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ProcessingSpec:
    """How documents are read, cleaned, filtered and encoded."""

    reading: Reading
    tokenizer: TokenizerConfig
    dtype: str
    append_eod: bool = False
    prepend_bos: bool = False
    clean: bool = False
    redact_pii: bool = False
    min_chars: int | None = None
    max_chars: int | None = None
    split_sentences: bool = False
    keep_newlines: bool = False
    lang: str = "english"
    digests: bool = False
    """Note a digest of each text, to find equal ones."""
    fast: bool = False
    """Encode with the fast encoder; does not change the ids."""

    @property
    def level(self) -> str:
        """What a sequence of the dataset is; the end of its name."""
        return "sentence" if self.split_sentences else "document"

    def versions(self) -> Mapping[str, str]:
        """The versions of what changes the text.

        Raises:
            PlatformError: a package that the spec needs is not installed.
        """
        found: dict[str, str] = {"megalm": __version__}
        if self.clean:
            found |= clean.versions()
        if self.redact_pii:
            found |= redact.versions()
        if self.split_sentences:
            found["sentences"] = sentences.version(self.lang)
        return found

    def digest(self, tokenizer: Tokenizer) -> str:
        """SHA-256 that is equal for those that give equal tokens."""
        content = asdict(replace(self, tokenizer=TokenizerConfig(), fast=False))
        del content["tokenizer"]
        special = (tokenizer.identity, tokenizer.special("eod"), tokenizer.special("bos"), tokenizer.vocab_size)
        return hashlib.sha256(json.dumps([content, special, dict(self.versions())]).encode()).hexdigest()
