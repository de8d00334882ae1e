"""Where the text comes from and how it becomes samples."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from megalm.config.base import FixedOnResume, MayDiffer, OneShot, OpenChoice, Section
from megalm.config.merging.names import VALUE_ALIASES
from megalm.config.noise import Denoiser
from megalm.config.paths import InputPath, PathText

TOKENIZER_TYPES = (
    "GPTSentencePieceTokenizer", "SentencePieceTokenizer", "Llama2Tokenizer", "HFTokenizer", "GPT2BPETokenizer",
    "TikTokenizer", "ByteLevelTokenizer", "NullTokenizer",
)  # fmt: skip


class TokenizerConfig(Section):
    """Which tokenizer turns text into ids."""

    tokenizer_type: Annotated[str | None, OpenChoice(TOKENIZER_TYPES)] = None
    """Kind of tokenizer. Default: told from its files."""
    tokenizer_model: Annotated[PathText | None, InputPath()] = None
    """Tokenizer file: a sentencepiece .model, a Hugging Face tokenizer.json, a tiktoken vocabulary; or its folder."""
    vocab_file: Annotated[PathText | None, InputPath()] = None
    """vocab.json of a GPT2BPETokenizer."""
    merge_file: Annotated[PathText | None, InputPath()] = None
    """merges.txt of a GPT2BPETokenizer."""
    tokenizer_vocab_size: int | None = Field(None, ge=1)
    """Number of ids of a NullTokenizer (its text is ids with blanks between) without end of document, or of a
    TikTokenizer with all special tokens."""
    vocab_extra_ids: int | None = Field(None, ge=0)
    """Tokens <extra_id_0>, ... to add to any tokenizer, after its own. The first are sentinels; from the last on they
    also stand for what an objective needs and the tokenizer lacks (docs/objectives.md)."""
    eod_token: str | None = None
    """Token that ends a document. Default: the tokenizer's own (see docs/data.md)."""
    tiktoken_pattern: Literal["v1", "v2", "r50k", "cl100k", "o200k", "llama3", "qwen"] | None = None
    """How a TikTokenizer cuts text into words. Default: v2 for Megatron's JSON; that of a known BPE file."""
    tiktoken_num_special_tokens: int | None = Field(None, ge=7)
    """Special tokens before the vocabulary of a TikTokenizer in Megatron's JSON. Default: 1000."""

    @property
    def is_given(self) -> bool:
        """Whether these settings name a tokenizer."""
        return any(value is not None for value in (self.tokenizer_type, self.tokenizer_model, self.vocab_file))

    @field_validator("tokenizer_type", mode="before")
    @classmethod
    def _peer_name(cls, word: object) -> object:
        """Takes Megatron's names of the same tokenizers, in any case."""
        if not isinstance(word, str):
            return word
        known = {name.lower(): name for name in TOKENIZER_TYPES}
        aliases = known | VALUE_ALIASES["tokenizer_type"]
        return aliases.get(word.lower(), word)


@dataclass(frozen=True)
class BlendSpec:
    """Prefixes of datasets and their weights (None: in proportion to their sizes)."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None = None

    @classmethod
    def parse(cls, words: Sequence[str]) -> "BlendSpec":
        """The blend that `W P W P` or `P P P` says, by Megatron's rule.

        An odd number of words is prefixes; an even number is weights and prefixes in turn, or prefixes alone when no
        word in the place of a weight is a number.

        Raises:
            ValueError: weights for some prefixes only, behind them or in one word with them, or not positive.
        """
        given = [_number(word) for word in words]
        for word in words:
            if len(parts := word.split()) > 1 and _number(parts[0]) is not None:
                raise ValueError(f'"{word}" is one word; leave out the quotes, so that it is {len(parts)}')
        if len(words) % 2 == 0 and not any(n is not None for n in given[::2]) and None not in given[1::2]:
            turned = " ".join(f"{weight} {prefix}" for prefix, weight in zip(words[::2], words[1::2], strict=True))
            raise ValueError(f"a weight stands before its prefix: {turned}")
        if len(words) % 2:
            if len(words) > 1 and given[0] is not None and given[2] is not None:
                raise ValueError(f"{' '.join(words)} must be a prefix, prefixes, or weights and prefixes in turn")
            return cls(tuple(words))
        weights, prefixes = given[::2], tuple(words[1::2])
        if all(weight is None for weight in weights):
            return cls(tuple(words))
        for word, weight, prefix in zip(words[::2], weights, prefixes, strict=True):
            if weight is None:
                raise ValueError(f'"{word}" stands where the weight of {prefix} is expected; give all weights or none')
            if not 0 < weight < math.inf:
                raise ValueError(f"the weight {word} of {prefix} must be positive; leave a dataset out to not use it")
        return cls(prefixes, tuple(weight for weight in weights if weight is not None))


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _as_words(value: object) -> object:
    """A single prefix as a list of one, and a recipe's numbers as words."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, (list, tuple)):
        return [str(word) if isinstance(word, int | float) and not isinstance(word, bool) else word for word in value]
    return value


_SHARE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(?:[eE]\+?\d{1,2})?%?", re.ASCII)


def split_shares(split: str) -> tuple[float, float, float]:
    """The three shares of a text as "969, 30, 1", summing to 1 (missing ones are 0).

    Raises:
        ValueError: something else than numbers in it, more than three, or their sum is 0.
    """
    words = [word for word in re.split(r"[,/\s]+", split.strip(" []()")) if word]
    numbers = [float(word.removesuffix("%")) for word in words if _SHARE.fullmatch(word)]
    if len(numbers) < len(words) or not 1 <= len(numbers) <= 3 or sum(numbers) <= 0:
        raise ValueError(f'split="{split}" must hold one to three shares with a positive sum, as "969, 30, 1"')
    numbers += [0.0] * (3 - len(numbers))
    total = sum(numbers)
    train, valid, test = (number / total for number in numbers)
    return train, valid, test


UL2 = "R:0.15:3,R:0.15:8,S:0.25,X:0.5:3,X:0.5:8,X:0.15:64,X:0.5:64"
"""Tay et al. 2022 (UL2), arXiv:2205.05131, table 1."""


def _denoisers(text: str) -> str:
    Denoiser.read(text)
    return text


Paths = Annotated[tuple[PathText, ...], BeforeValidator(_as_words), Field(min_length=1)]
DATASET = InputPath((".idx", ".bin"))


class DataConfig(Section):
    """The datasets and the order of their samples."""

    # on resume paths may change: the record of the order knows the data
    data_path: Annotated[Paths | None, DATASET] = None
    """Prefix of an indexed dataset (PREFIX.bin and PREFIX.idx, as `megalm preprocess` writes them), or several to
    blend: `WEIGHT PREFIX WEIGHT PREFIX`, or `PREFIX PREFIX` in proportion to their sizes, one epoch of each."""
    train_data_path: Annotated[Paths | None, DATASET] = None
    """Prefixes for training only (with --valid-data-path, in place of --data-path and --split)."""
    valid_data_path: Annotated[Paths | None, DATASET] = None
    """Prefixes for validation only."""
    test_data_path: Annotated[Paths | None, DATASET] = None
    """Prefixes for the test after training only."""
    multiple_validation_sets: bool = False
    """Each prefix of --valid-data-path is a validation set of its own, reported by its name, in place of a blend."""
    full_validation: bool = False
    """Evaluate on the whole validation set (one epoch), in place of --eval-iters batches of it."""
    split: Annotated[str, FixedOnResume(meaning=split_shares)] = "969, 30, 1"
    """Shares of --data-path for training, validation and test, by position."""
    sampling: Annotated[Literal["shuffle", "stream", "consecutive"], FixedOnResume()] = "shuffle"
    """Order of samples: shuffle is Megatron-LM's (documents and samples shuffled by an index); stream cuts the
    documents in file order and permutes the samples by a formula, so that any size opens at once; consecutive cuts
    them so too and lets every row of the global batch read on where it was in the step before."""
    data_cache_path: Annotated[PathText | None, MayDiffer()] = None
    """Folder where built indices are kept for the next start and shared by the ranks of a node. Default: none, each
    rank builds them in memory."""
    allow_changed_data: Annotated[bool, OneShot()] = False
    """Continue a run although datasets were added, dropped or replaced; those that stay go on where they were."""
    mock_data: Annotated[bool, FixedOnResume()] = False
    """Train on generated tokens instead of a dataset."""
    reset_position_ids: bool = False
    """Positions start again at 0 after each end-of-document token."""
    reset_attention_mask: bool = False
    """Documents in one sample do not see each other."""
    eod_mask_loss: Annotated[bool, FixedOnResume()] = False
    """No loss on end-of-document tokens."""
    mask_prob: Annotated[float, FixedOnResume()] = Field(0.15, gt=0.0, lt=1.0)
    """--objective masked, rtd: share of the tokens that are hidden (80 % masked, 10 % replaced, 10 % left; of rtd all
    masked)."""
    whole_word_masking: Annotated[bool, FixedOnResume()] = False
    """--objective masked, rtd: hide whole words; the tokenizer must know them (WordPiece, sentencepiece, byte-level
    BPE)."""
    masking_max_ngram: Annotated[int | None, FixedOnResume()] = Field(None, ge=1)
    """--objective masked, rtd: hide runs of up to so many tokens (with --whole-word-masking: words), those of n with
    probability ~ 1 / n (ALBERT). Default: 1; 10 with --masking-use-geometric-distribution."""
    masking_use_longer_ngrams: Annotated[bool, FixedOnResume()] = False
    """--objective masked, rtd: the longest runs are the most frequent ones instead."""
    masking_use_geometric_distribution: Annotated[bool, FixedOnResume()] = False
    """--objective masked, rtd: lengths of runs are geometric with p = 0.2, none longer than --masking-max-ngram, and
    all of a run is masked, replaced or left (SpanBERT)."""
    bert_sentence_head: Annotated[Literal["sop", "nsp"], FixedOnResume()] = "sop"
    """What the sentence head tells of two texts: sop, whether they are exchanged (ALBERT, Megatron); nsp, whether the
    second is of another document (BERT)."""
    short_seq_prob: Annotated[float, FixedOnResume()] = Field(0.1, ge=0.0, le=1.0)
    """Share of the pairs of texts (BERT with its sentence head) that are cut to a random length."""
    noise_density: Annotated[float, FixedOnResume()] = Field(0.15, gt=0.0, lt=1.0)
    """Span corruption: share of the tokens that the decoder is to restore."""
    mean_noise_span_length: Annotated[float, FixedOnResume()] = Field(3.0, ge=1.0)
    """Span corruption: mean number of consecutive tokens that one sentinel stands for."""
    fim_rate: Annotated[float, FixedOnResume()] = Field(0.5, ge=0.0, le=1.0)
    """--objective fim: share of the documents whose middle is moved to their end."""
    fim_spm_rate: Annotated[float, FixedOnResume()] = Field(0.5, ge=0.0, le=1.0)
    """--objective fim: share of these that begin with their suffix (SPM) and not with their prefix (PSM)."""
    fim_unit: Annotated[Literal["token", "character"], FixedOnResume()] = "token"
    """--objective fim: cut documents between tokens, or at any character (the cut token becomes two), which the
    tokenizer must allow: sentencepiece with a blank before every text does not."""
    fim_split_sample: Annotated[str | None, FixedOnResume()] = None
    """--objective fim: token that parts a document into fragments (files of a repository), each cut by itself."""
    fim_fragment_rate: Annotated[float, FixedOnResume()] = Field(0.5, ge=0.0, le=1.0)
    """--objective fim: share of the fragments of such a document whose middle is moved."""
    fim_no_prefix: Annotated[str | None, FixedOnResume()] = None
    """--objective fim: documents and fragments whose text begins so stay as they are."""
    fim_prefix_token: Annotated[str | None, FixedOnResume()] = None
    """--objective fim: token before a prefix. Default: the tokenizer's <fim_prefix> (see docs/objectives.md)."""
    fim_middle_token: Annotated[str | None, FixedOnResume()] = None
    """--objective fim: token before a middle. Default: <fim_middle>."""
    fim_suffix_token: Annotated[str | None, FixedOnResume()] = None
    """--objective fim: token before a suffix. Default: <fim_suffix>."""
    ul2_denoisers: Annotated[str, FixedOnResume(), AfterValidator(_denoisers)] = UL2
    """--objective ul2: what a sample may become, all as likely (one that stands twice twice): R:DENSITY:MEAN and
    X:DENSITY:MEAN are span corruption with this share of noise and this mean span, S:DENSITY is the end of the text."""
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
        if self.multiple_validation_sets and self.valid_data_path is None:
            found.append("multiple_validation_sets=true needs the sets in --valid-data-path PREFIX PREFIX")
        if self.mock_data and self.full_validation:
            found.append("full_validation=true needs a dataset that ends, not mock_data=true; give --data-path")
        for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
            found += self._blend_problems(name)
        try:
            self.split_shares()
        except ValueError as error:
            found.append(str(error))
        return found

    def _blend_problems(self, name: str) -> list[str]:
        try:
            blend = self.blend(name)
        except ValueError as error:
            return [f"{name}: {error}"]
        if name == "valid_data_path" and blend is not None and blend.weights is not None:
            if self.multiple_validation_sets:
                return [f"{name}: sets of their own (multiple_validation_sets=true) have no weights; drop the weights"]
            if self.full_validation and len(blend.prefixes) > 1:
                return [f"{name}: whole sets (full_validation=true) cannot be weighted; drop the weights"]
        if name == "data_path" and blend is not None and blend.weights is not None and self.full_validation:
            return [f"{name}: full_validation=true needs a blend without weights, or --valid-data-path"]
        return []

    def blend(self, name: str) -> BlendSpec | None:
        """The blend that `data_path` or one of the per-split paths says; None when it is not given.

        Raises:
            ValueError: as BlendSpec.parse.
        """
        words: tuple[str, ...] | None = getattr(self, name)
        return BlendSpec.parse(words) if words else None

    def split_shares(self) -> tuple[float, float, float]:
        """The three shares of `split`: see the function."""
        return split_shares(self.split)
