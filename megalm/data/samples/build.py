"""The training, validation and test datasets of a run, or one error that says what to change."""

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megalm.config.data import DataConfig
from megalm.data.indexed.manifest import check_tokenizer, ends_documents
from megalm.data.indexed.reader import IndexedDataset
from megalm.data.samples.blended_dataset import BlendedDataset, OrderRecord
from megalm.data.samples.gpt_dataset import MockDataset
from megalm.data.samples.gpt_index import split_bounds
from megalm.data.samples.index_cache import IndexCache
from megalm.data.samples.sample import SampleDataset
from megalm.data.samples.source import Sampling, Source
from megalm.errors import DataError
from megalm.storage.faults import reading

SPLITS = ("train", "valid", "test")
PATHS = ("train_data_path", "valid_data_path", "test_data_path")

log = logging.getLogger("megalm")


@dataclass(frozen=True, kw_only=True)
class Datasets:
    """What a run trains and is evaluated on."""

    train: SampleDataset | None
    valid: dict[str, SampleDataset]
    """Validation sets by name; one without a name ("") unless each is to be reported by itself."""
    test: SampleDataset | None
    train_names: tuple[str, ...] = ()
    """Names of the datasets that the training samples come from."""


@dataclass(frozen=True, kw_only=True)
class _Wish:
    """What is wanted of one split."""

    name: str
    num_samples: int | None
    """None: all of it, one epoch."""
    rows: int
    """Samples of a global batch of it."""


def build_datasets(
    data: DataConfig,
    *,
    seq_length: int,
    extra_tokens: int = 1,
    num_samples: tuple[int, int | None, int],
    rows: tuple[int, int] = (1, 1),
    seed: int,
    vocab_size: int,
    tokenizer_identity: str | None = None,
    eod: int | None = None,
    record: OrderRecord | None = None,
    verify: bool = True,
) -> Datasets:
    """The datasets with `num_samples` samples of (train, valid, test) at least.

    A split has none when its share of --split is 0, when its path is not given, or when 0 samples are asked for.

    Args:
        seq_length: tokens from the start of one sample to that of the next.
        extra_tokens: tokens of a sample beyond them, which it shares with the next one.
        num_samples: samples that the run draws from each split; None is one epoch, without --mock-data.
        rows: samples of a global batch in training and in evaluations, for an order in which each reads on.
        tokenizer_identity: the run's tokenizer; checked against the one that the data was made with, if known.
        eod: the token that ends documents, for the flags that look for it.
        record: the order of the training samples up to the checkpoint that the run goes on from.
        verify: compare the training data with all that `record` knows of it; one rank of a job is enough.

    Raises:
        DataError: missing or damaged files, too few documents or tokens, or those of another tokenizer.
        CheckpointError: other datasets than the record's.
    """
    if data.mock_data:
        return _mock_datasets(vocab_size, seq_length, extra_tokens, seed, num_samples)
    opened: dict[str, IndexedDataset] = {}
    cache = IndexCache(data.data_cache_path) if data.data_cache_path else None
    sampling = Sampling(seq_length=seq_length, extra_tokens=extra_tokens, seed=seed, order=data.sampling, cache=cache)
    wishes = zip(SPLITS, num_samples, (rows[0], rows[1], rows[1]), strict=True)
    train, valid, test = (_Wish(name=name, num_samples=n, rows=b) for name, n, b in wishes)
    blends = _blends(data, [train, valid, test], opened)
    for indexed in opened.values():
        _check_fit(data, indexed, vocab_size, tokenizer_identity, eod)

    def build(wish: _Wish, blend: _Documents | None, **options: Any) -> BlendedDataset | None:
        if blend is None:
            return None
        sources = [Source(indexed, documents, replace(sampling, rows=wish.rows)) for indexed, documents in blend.parts]
        try:
            return BlendedDataset(sources, blend.weights, wish.num_samples, **options)
        except DataError as error:
            raise DataError(f"{wish.name} split of {error}") from error

    sets = _validation_sets(data, blends[1])
    built = {name: build(valid, blend, capped=True) for name, blend in sets.items()}
    return Datasets(
        train=build(train, blends[0], record=record, allow_changed=data.allow_changed_data, verify=verify),
        valid={name: dataset for name, dataset in built.items() if dataset is not None},
        test=_unasked(data, lambda: build(test, blends[2], capped=True)),
        train_names=short_names([indexed.prefix for indexed, _ in blends[0].parts]) if blends[0] else (),
    )


def _validation_sets(data: DataConfig, blend: "_Documents | None") -> Mapping[str, "_Documents | None"]:
    """By name; one without a name unless each part of the blend is to be reported by itself."""
    if blend is None or not data.multiple_validation_sets:
        return {"": blend}
    names = short_names([indexed.prefix for indexed, _ in blend.parts])
    return {name: _Documents([part], None) for name, part in zip(names, blend.parts, strict=True)}


def _unasked(data: DataConfig, build: Callable[[], BlendedDataset | None]) -> BlendedDataset | None:
    """The test set; none, with a line, where the share of --split that is left for it is too small for one."""
    if data.data_path is None:
        return build()
    try:
        return build()
    except DataError as error:
        log.info("no test set: %s", error)
        return None


def _check_fit(
    data: DataConfig, indexed: IndexedDataset, vocab_size: int, tokenizer_identity: str | None, eod: int | None
) -> None:
    """Checks that a dataset fits the run's tokenizer and flags; from here on each of its tokens is looked at."""
    check_tokenizer(indexed.prefix, tokenizer_identity)  # with another one, ids may be too large as well
    indexed.vocab_size = vocab_size
    indexed.check_token_range()
    _check_ends(data, indexed, eod)


_NEEDS_EOD = ("reset_attention_mask", "reset_position_ids", "eod_mask_loss")
_LOOKED_AT = 256
"""Documents whose last token is looked at."""


def _check_ends(data: DataConfig, indexed: IndexedDataset, eod: int | None) -> None:
    """Checks that documents end with `eod` where a flag says that something is to happen there.

    Raises:
        DataError: the flag would do nothing.
    """
    flags = ["--" + name.replace("_", "-") for name in _NEEDS_EOD if getattr(data, name)]
    if not flags or eod is None:
        return
    last = indexed.document_indices[1 : 16 * _LOOKED_AT] - 1  # sequence of each document
    lengths = indexed.sequence_lengths[np.maximum(last, 0)]
    used = last[(lengths > 0) & (last >= 0)][:_LOOKED_AT].tolist()
    if any(int(indexed.get(i, int(indexed.sequence_lengths[i]) - 1)[0]) == eod for i in used):
        return
    told = ends_documents(indexed.prefix)
    rule = "was made without --append-eod" if told is False else f"has no end-of-document token ({eod}) where they end"
    text = (
        f"{indexed.prefix} {rule}, so {', '.join(flags)} would do nothing; preprocess the text again with "
        f"--append-eod, or drop {'the flag' if len(flags) == 1 else 'the flags'}"
    )
    if told:
        log.warning("%s (its manifest says otherwise)", text)
    else:
        raise DataError(text)


def _mock_datasets(
    vocab_size: int, seq_length: int, extra_tokens: int, seed: int, num_samples: tuple[int, int | None, int]
) -> Datasets:
    train, valid, test = (
        MockDataset(vocab_size, seq_length, seed, count, split=split, extra_tokens=extra_tokens) if count else None
        for split, count in enumerate(num_samples)
    )
    return Datasets(train=train, valid={} if valid is None else {"": valid}, test=test)


def short_names(prefixes: Sequence[str]) -> tuple[str, ...]:
    """The last part of each prefix; more parts where it does not tell them apart, a number where nothing does."""
    parts = [Path(prefix).parts for prefix in prefixes]
    names: list[str] = []
    for number, own in enumerate(parts):
        length = 1
        while length < len(own) and sum(other[-length:] == own[-length:] for other in parts) > 1:
            length += 1
        name = str(Path(*own[-length:]))
        names.append(f"{name} {number + 1}" if parts.count(own) > 1 else name)
    return tuple(names)


def open_dataset(prefix: str, *, scan: bool = True) -> IndexedDataset:
    """The indexed dataset of `prefix`; `scan` as in IndexedDataset.

    Raises:
        DataError: as IndexedDataset; for a missing file with the prefix that was probably meant.
    """
    with reading(prefix, DataError, "give this process the right to read it, or another --data-path"):
        missing = [path for path in (f"{prefix}.bin", f"{prefix}.idx") if not Path(path).is_file()]
    if not missing:
        return IndexedDataset(prefix, scan=scan)
    if "," in prefix and all(Path(f"{part.strip()}.idx").is_file() for part in prefix.split(",")):
        raise DataError(f"{prefix} is one word; separate prefixes by blanks: {' '.join(prefix.split(','))}")
    meant = _probably_meant(prefix)
    raise DataError(
        f"no file {' and no file '.join(missing)}; a data path is the PREFIX of PREFIX.bin and PREFIX.idx, as "
        f"`megalm preprocess` writes them" + (f"; did you mean {meant}?" if meant else "")
    )


def _probably_meant(prefix: str) -> str | None:
    path = Path(prefix)
    if not path.parent.is_dir():
        return None
    complete = sorted(
        str(index.with_suffix("")) for index in path.parent.glob("*.idx") if index.with_suffix(".bin").is_file()
    )
    if path.suffix in (".bin", ".idx") and str(path.with_suffix("")) in complete:
        return str(path.with_suffix(""))
    longer = [name for name in complete if name.startswith(str(path) + "_")]
    return next(iter(longer or difflib.get_close_matches(str(path), complete, n=1)), None)


@dataclass(frozen=True)
class _Documents:
    """Datasets of one split, the numbers of their sequences in it, and the weights of the blend."""

    parts: list[tuple[IndexedDataset, range]]
    weights: tuple[float, ...] | None


def _blends(data: DataConfig, wishes: Sequence[_Wish], opened: dict[str, IndexedDataset]) -> list[_Documents | None]:
    """What each split is made of; every dataset that is needed is opened once."""

    def opening(prefix: str) -> IndexedDataset:
        if prefix not in opened:
            opened[prefix] = open_dataset(prefix, scan=data.sampling == "shuffle")
        return opened[prefix]

    whole = data.blend("data_path")
    if whole is not None:
        parts = [opening(prefix) for prefix in whole.prefixes]
        return [
            _share_of(data, parts, whole.weights, number, wish) if wish.num_samples != 0 else None
            for number, wish in enumerate(wishes)
        ]
    found: list[_Documents | None] = []
    for path, wish in zip(PATHS, wishes, strict=True):
        blend = data.blend(path) if wish.num_samples != 0 else None
        if blend is None:
            found.append(None)
            continue
        parts = [opening(prefix) for prefix in blend.prefixes]
        weights = blend.weights if len(parts) > 1 else None  # as in Megatron: nothing to blend
        found.append(_Documents([(indexed, range(len(indexed))) for indexed in parts], weights))
    return found


def _share_of(
    data: DataConfig, parts: list[IndexedDataset], weights: tuple[float, ...] | None, number: int, wish: _Wish
) -> _Documents | None:
    """One split's share of --data-path."""
    shares = data.split_shares()
    if shares[number] == 0:
        return None
    found = []
    for indexed in parts:
        start, stop = split_bounds(shares, len(indexed))[number]
        if start == stop:
            if wish.name == "test":
                log.info('no test set: --split "%s" leaves it no document of %s', data.split, indexed.prefix)
                return None
            wanted = "all" if wish.num_samples is None else wish.num_samples
            raise DataError(
                f'--split "{data.split}" leaves the {wish.name} split none of the {len(indexed)} documents of '
                f"{indexed.prefix}, but {wanted} samples of it are wanted; {_SPLIT_ADVICE}"
            )
        found.append((indexed, range(start, stop)))
    return _Documents(found, weights)


_SPLIT_ADVICE = 'give it a larger share, or none at all: --split "90, 10, 0" has no test split'
