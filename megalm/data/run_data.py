"""The data of a run: its datasets, its objective, and this rank's micro-batches of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy.typing as npt

from megalm.config.sections import RunConfig
from megalm.data.batch import Batch
from megalm.data.loader import Fields, MicroBatchIterator, build_loader
from megalm.data.samples.blended_dataset import BlendedDataset, OrderRecord
from megalm.data.samples.build import build_datasets
from megalm.data.samples.sample import HasDocuments, Sample, SampleDataset
from megalm.data.tokenizers import Tokenizer
from megalm.errors import DataError


class Objective(Protocol):
    """An objective, as the data see it."""

    @property
    def shared_tokens(self) -> int:
        """How many tokens of a sample are also the first ones of the next."""

    def sample_tokens(self, seq_length: int) -> int:
        """How many tokens of the data an example takes where the model gets `seq_length`."""

    def fields(self, seq_length: int) -> Fields:
        """(shape, dtype) of each array of an example."""

    def __call__(self, sample: Sample) -> dict[str, npt.NDArray[Any]]:
        """The arrays of one batch row."""


@runtime_checkable
class UsesDocuments(Protocol):
    """An objective that may look at other documents than those of a sample."""

    @property
    def needs_documents(self) -> bool:
        """Whether it does."""

    def with_documents(self, documents: HasDocuments) -> Objective:
        """The objective that takes them from there."""


@runtime_checkable
class HasStatistics(Protocol):
    """An objective that says of batches what it has made of them."""

    def statistics(self, batch: Mapping[str, npt.NDArray[Any]]) -> Mapping[str, tuple[float, float]]:
        """What is counted of a batch by name: (sum, what it is divided by)."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The datasets of a run (None: not used), the objective that turns a sample into a batch row, and the rank's share.

    `rank` of `size` data-parallel ranks.
    """

    config: RunConfig
    rank: int
    size: int
    pin_memory: bool
    objective: Objective
    train: SampleDataset | None
    valid: dict[str, SampleDataset]
    """Validation sets by name; "" for the only one."""
    test: SampleDataset | None
    train_names: tuple[str, ...] = ()
    """Names of the datasets that the training samples come from."""
    speaks: bool = True
    """This rank says what is wrong with a sample, for all that read the same ones."""

    @classmethod
    def build(
        cls,
        config: RunConfig,
        tokenizer: Tokenizer | None,
        objective: Objective,
        *,
        rank: int,
        size: int,
        pin_memory: bool,
        trained_samples: int,
        record: OrderRecord | None,
        speaks: bool = True,
        verify: bool = True,
    ) -> "RunData":
        """The datasets, each with as many samples as the run draws from it: `trained_samples` for training.

        `record` is the order of the training samples up to the checkpoint that the run goes on from; `verify` as in
        `build_datasets`.

        Raises:
            DataError, CheckpointError: as `build_datasets`; or an epoch is less than one global batch.
        """
        training, global_batch_size = config.training, max(config.batch.schedule(size).sizes)
        assert config.model.vocab_size is not None, "complete_model fills it in"
        eval_batch_size = config.eval_sizes(size)[1]
        evaluated = training.eval_iters * eval_batch_size
        built = build_datasets(
            config.data,
            seq_length=objective.sample_tokens(config.batch.seq_length) - objective.shared_tokens,
            extra_tokens=objective.shared_tokens,
            num_samples=(
                0 if training.skip_train else trained_samples,
                None if config.data.full_validation and evaluated else evaluated,
                evaluated,
            ),
            rows=(global_batch_size, eval_batch_size),
            seed=training.seed,
            vocab_size=config.model.vocab_size,
            tokenizer_identity=tokenizer.identity if tokenizer else None,
            eod=tokenizer.special("eod") if tokenizer else None,
            record=record,
            verify=verify,
        )
        _check_training_data(config, built.train, trained_samples, global_batch_size)
        return cls(
            config=config,
            rank=rank,
            size=size,
            pin_memory=pin_memory,
            objective=objective,
            train=built.train,
            valid=built.valid,
            test=built.test,
            train_names=built.train_names,
            speaks=speaks,
        )

    def batches(self, dataset: SampleDataset, start: int, stop: int, *, workers: int) -> MicroBatchIterator:
        """This rank's micro-batches of samples start..stop of all ranks; those of training have seeds."""
        batch, trains, objective = self.config.batch, dataset is self.train, self.objective
        if isinstance(objective, UsesDocuments) and objective.needs_documents:
            if not isinstance(dataset, HasDocuments):
                raise DataError(f"{type(dataset).__name__} does not know its documents, which the objective needs")
            objective = objective.with_documents(dataset)
        micro_batch_size = batch.micro_size if trains else self.config.eval_sizes(self.size)[0]
        return build_loader(
            dataset,
            objective,
            micro_batch_size=micro_batch_size,
            global_batch_size=micro_batch_size * self.size,  # start..stop is whole steps, perhaps of several sizes
            start_sample=start,
            stop_sample=stop,
            rank=self.rank,
            size=self.size,
            num_workers=workers,
            pin_memory=self.pin_memory,
            dataset_ids=trains and len(self.train_names) > 1,
            fields=self.objective.fields(batch.seq_length),
            seed=self.config.training.seed if trains else None,
            speaks=self.speaks,
        )

    def statistics(self, batches: Sequence[Batch]) -> dict[str, float]:
        """What the objective has made of these batches, on the host, as a row reports it: "data/mask_rate", ...

        0 where nothing counts.
        """
        if not isinstance(self.objective, HasStatistics):
            return {}
        sums: dict[str, tuple[float, float]] = {}
        for batch in batches:
            arrays = {name: x.numpy() for name, x in batch.tensors.items()}
            for name, (value, count) in self.objective.statistics(arrays).items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + value, before[1] + count)
        return {f"data/{name}": value / max(count, 1) for name, (value, count) in sums.items()}


def _check_training_data(
    config: RunConfig, train: SampleDataset | None, trained_samples: int, global_batch_size: int
) -> None:
    """Checks that there is something to train on, a global batch of it in one epoch.

    Raises:
        DataError: there is not.
    """
    if train is None and trained_samples and not config.training.skip_train:
        raise DataError(
            f'--split "{config.data.split}" leaves training nothing; give it a share, or only evaluate with '
            "--skip-train"
        )
    if isinstance(train, BlendedDataset) and train.samples_per_epoch < global_batch_size:
        raise DataError(
            f"the training data has {train.samples_per_epoch} samples of {config.batch.seq_length} tokens in "
            f"one epoch, less than one global batch of {global_batch_size}; give more data, or a smaller "
            "--global-batch-size or --seq-length"
        )
