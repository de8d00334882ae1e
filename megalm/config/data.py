"""Where the text comes from and how it becomes samples."""

import re
from typing import Literal, get_args

from pydantic import Field, field_validator

from megalm.config.base import Section
from megalm.config.names import VALUE_ALIASES

TokenizerType = Literal["SentencePieceTokenizer", "HFTokenizer", "ByteLevelTokenizer", "NullTokenizer"]


class TokenizerConfig(Section):
    """Which tokenizer turns text into ids."""

    tokenizer_type: TokenizerType | None = None
    """Kind of tokenizer. Default: told from the file name of --tokenizer-model."""
    tokenizer_model: str | None = None
    """Tokenizer file: a sentencepiece .model or a Hugging Face tokenizer.json, or the folder that holds one."""
    tokenizer_vocab_size: int | None = Field(None, ge=1)
    """Number of ids of a NullTokenizer (its text is ids with blanks between), without end of document."""
    eod_token: str | None = None
    """Token that ends a document. Default: the sentencepiece end of sentence; <|endoftext|>, </s>, <eos> or [SEP]."""

    @field_validator("tokenizer_type", mode="before")
    @classmethod
    def _peer_name(cls, word: object) -> object:
        """Takes Megatron's names of the same tokenizers, in any case."""
        if not isinstance(word, str):
            return word
        known = {name.lower(): name for name in get_args(TokenizerType)}
        aliases = known | VALUE_ALIASES["tokenizer_type"]
        return aliases.get(word.lower(), word)


class DataConfig(Section):
    """The dataset and the order of its samples."""

    data_path: str | None = None
    """Prefix of an indexed dataset: PREFIX.bin and PREFIX.idx, as `megalm preprocess` writes them."""
    train_data_path: str | None = None
    """Prefix for training only (with --valid-data-path, in place of --data-path and --split)."""
    valid_data_path: str | None = None
    """Prefix for validation only."""
    test_data_path: str | None = None
    """Prefix for the test after training only."""
    split: str = "969, 30, 1"
    """Shares of --data-path for training, validation and test, by position."""
    data_cache_path: str | None = None
    """Folder for index caches. Default: next to the data, in PREFIX/cache."""
    mock_data: bool = False
    """Train on generated tokens instead of a dataset."""
    reset_position_ids: bool = False
    """Positions start again at 0 after each end-of-document token."""
    reset_attention_mask: bool = False
    """Documents in one sample do not see each other."""
    eod_mask_loss: bool = False
    """No loss on end-of-document tokens."""
    num_workers: int = Field(2, ge=0)
    """Background processes that prepare batches; 0 prepares them in the training process."""

    def problems(self) -> list[str]:
        """Everything about these paths and shares that cannot work, one text each."""
        found = []
        per_split = [self.train_data_path, self.valid_data_path, self.test_data_path]
        sources = [self.data_path is not None, any(p is not None for p in per_split), self.mock_data]
        if sum(sources) != 1:
            found.append(
                "exactly one source of data is needed: --data-path PREFIX, or --train-data-path PREFIX "
                "(with --valid-data-path), or --mock-data"
            )
        if any(per_split) and self.train_data_path is None:
            found.append("--valid-data-path and --test-data-path need --train-data-path")
        try:
            self.split_shares()
        except ValueError as error:
            found.append(str(error))
        return found

    def split_shares(self) -> tuple[float, float, float]:
        """The three shares of `split`, summing to 1 (missing ones are 0).

        Raises:
            ValueError: no number in `split`, more than three, or their sum is 0.
        """
        numbers = [float(text) for text in re.findall(r"\d+(?:\.\d+)?|\.\d+", self.split)]
        if not 1 <= len(numbers) <= 3 or sum(numbers) <= 0:
            raise ValueError(f'split="{self.split}" must hold one to three shares with a positive sum, as "969, 30, 1"')
        numbers += [0.0] * (3 - len(numbers))
        total = sum(numbers)
        train, valid, test = (number / total for number in numbers)
        return train, valid, test
