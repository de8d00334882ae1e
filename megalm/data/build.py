"""The training, validation and test datasets of a run, or one error that says what to change."""

import difflib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megalm.config.data import DataConfig
from megalm.data.gpt_dataset import GPTDataset, MockDataset, SampleDataset
from megalm.data.indexed import IndexedDataset
from megalm.data.manifest import check_tokenizer
from megalm.data.sampling import split_bounds
from megalm.errors import DataError

Datasets = tuple[SampleDataset | None, SampleDataset | None, SampleDataset | None]

SPLITS = ("train", "valid", "test")
DEFAULT_SPLIT = DataConfig.model_fields["split"].default


def build_datasets(
    data: DataConfig,
    *,
    seq_length: int,
    num_samples: tuple[int, int, int],
    seed: int,
    vocab_size: int,
    tokenizer_identity: str | None = None,
) -> Datasets:
    """The (train, valid, test) datasets with `num_samples` samples at least; None where nothing is asked for.

    A split is None when its share of --split is 0, when its path is not given, or when 0 samples are asked for.

    Args:
        num_samples: samples that the run draws from each split.
        tokenizer_identity: the run's tokenizer; checked against the one that the data was made with, if known.

    Raises:
        DataError: missing or damaged files, a split without documents, fewer tokens than one sample, ids outside
            the vocabulary, or another tokenizer.
    """
    if data.mock_data:
        mock = [
            MockDataset(vocab_size, seq_length, seed, count, split=split) if count > 0 else None
            for split, count in enumerate(num_samples)
        ]
        return mock[0], mock[1], mock[2]
    documents = _documents(data, num_samples)
    for indexed in {entry[0].prefix: entry[0] for entry in documents if entry is not None}.values():
        indexed.check_token_range(vocab_size)
        check_tokenizer(indexed.prefix, tokenizer_identity)
    built = [
        None if entry is None else _gpt_dataset(name, *entry, seq_length, count, seed)
        for name, entry, count in zip(SPLITS, documents, num_samples, strict=True)
    ]
    return built[0], built[1], built[2]


def _gpt_dataset(
    name: str, indexed: IndexedDataset, documents: npt.NDArray[np.int32], seq_length: int, num_samples: int, seed: int
) -> GPTDataset:
    try:
        return GPTDataset(indexed, documents, seq_length, num_samples, seed)
    except DataError as error:
        raise DataError(f"{name} split of {error}") from error


def open_dataset(prefix: str) -> IndexedDataset:
    """The indexed dataset of `prefix`.

    Raises:
        DataError: as IndexedDataset; for a missing file with the prefix that was probably meant.
    """
    missing = [path for path in (f"{prefix}.bin", f"{prefix}.idx") if not Path(path).is_file()]
    if not missing:
        return IndexedDataset(prefix)
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


_Documents = tuple[IndexedDataset, npt.NDArray[np.int32]] | None


def _whole(indexed: IndexedDataset) -> _Documents:
    return indexed, np.arange(len(indexed), dtype=np.int32)


def _documents(data: DataConfig, num_samples: tuple[int, int, int]) -> list[_Documents]:
    """Dataset and sequence numbers of each split."""
    if data.data_path is None:
        paths = (data.train_data_path, data.valid_data_path, data.test_data_path)
        return [
            _whole(open_dataset(path)) if path and count > 0 else None
            for path, count in zip(paths, num_samples, strict=True)
        ]
    indexed = open_dataset(data.data_path)
    shares = data.split_shares()
    found: list[_Documents] = []
    for name, share, (start, stop), count in zip(
        SPLITS, shares, split_bounds(shares, len(indexed)), num_samples, strict=True
    ):
        if share == 0 or count == 0:
            found.append(None)
        elif start == stop and name == "test" and data.split == DEFAULT_SPLIT:
            found.append(None)  # nobody asked for a test set
        elif start == stop:
            raise DataError(
                f'--split "{data.split}" leaves the {name} split none of the {len(indexed)} documents of '
                f"{indexed.prefix}, but {count} samples of it are wanted; {_SPLIT_ADVICE}"
            )
        else:
            found.append((indexed, np.arange(start, stop, dtype=np.int32)))
    return found


_SPLIT_ADVICE = 'give it a larger share, or none at all: --split "90, 10, 0" has no test split'
