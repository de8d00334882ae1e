"""The parts of a run, built from its configuration in the order in which the data flows."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from megalm.checkpoint.run_folder import lock_run_folder, prepare_run_folder, set_aside
from megalm.config import RunConfig
from megalm.config.model import ModelConfig
from megalm.continuation import ResumePoint
from megalm.data.loader import MicroBatchIterator, Transform, build_loader
from megalm.data.samples.blended_dataset import BlendedDataset
from megalm.data.samples.build import build_datasets
from megalm.data.samples.gpt_dataset import SampleDataset
from megalm.data.tokenizers import Tokenizer
from megalm.distributed.collectives import on_all_ranks
from megalm.distributed.context import RankContext
from megalm.distributed.mesh import Axis
from megalm.engine.engine import Engine
from megalm.errors import DataError
from megalm.objectives.causal import CausalObjective
from megalm.parallel.build import build_rank_model
from megalm.parallel.kernels import choose_kernels


@dataclass(frozen=True)
class Data:
    """The datasets of a run (None: not used) and the objective that turns a sample into a batch row."""

    train: SampleDataset | None
    valid: dict[str, SampleDataset]
    """Validation sets by name; "" for the only one."""
    test: SampleDataset | None
    objective: Transform
    train_names: tuple[str, ...] = ()
    """Names of the datasets that the training samples come from."""

    def order(self, consumed_samples: int) -> dict[str, Any] | None:
        """What a checkpoint records of the training samples; None where their number says all."""
        return asdict(self.train.record(consumed_samples)) if isinstance(self.train, BlendedDataset) else None


def build_data(
    config: RunConfig, model: ModelConfig, tokenizer: Tokenizer | None, global_batch_size: int, point: ResumePoint
) -> Data:
    """The datasets, each with as many samples as the run draws from it; training samples go on from `point`."""
    training = config.training
    assert model.vocab_size is not None
    evaluated = training.eval_iters * global_batch_size
    steps = training.total_iters(global_batch_size, point.step, point.consumed_samples) - point.step
    trained = point.consumed_samples + max(0, steps) * global_batch_size
    built = build_datasets(
        config.data,
        seq_length=config.batch.seq_length,
        num_samples=(
            0 if training.skip_train else trained,
            None if config.data.full_validation and evaluated else evaluated,
            evaluated,
        ),
        seed=training.seed,
        vocab_size=model.vocab_size,
        tokenizer_identity=tokenizer.identity if tokenizer else None,
        record=point.order,
    )
    if isinstance(built.train, BlendedDataset) and built.train.samples_per_epoch < global_batch_size:
        raise DataError(
            f"the training data has {built.train.samples_per_epoch} samples of {config.batch.seq_length} tokens in one "
            f"epoch, less than one global batch of {global_batch_size}; give more data, or a smaller "
            "--global-batch-size or --seq-length"
        )
    objective = CausalObjective(
        eod=tokenizer.eod if tokenizer else None,
        eod_mask_loss=config.data.eod_mask_loss,
        reset_position_ids=config.data.reset_position_ids,
        reset_attention_mask=config.data.reset_attention_mask,
    )
    return Data(built.train, built.valid, built.test, objective, built.train_names)


def loader(
    config: RunConfig, data: Data, dataset: SampleDataset, context: RankContext, start: int, stop: int, workers: int
) -> MicroBatchIterator:
    """This rank's micro-batches of samples start..stop."""
    dp = context.mesh.size(Axis.DP)
    blended = isinstance(dataset, BlendedDataset) and dataset.num_datasets > 1 and dataset is data.train
    return build_loader(
        dataset,
        data.objective,
        micro_batch_size=config.batch.micro_size,
        global_batch_size=config.batch.global_size(dp),
        start_sample=start,
        stop_sample=stop,
        rank=context.dp_rank,
        size=dp,
        num_workers=workers,
        pin_memory=context.device.type == "cuda",
        dataset_of=data.train.dataset_of if blended and isinstance(data.train, BlendedDataset) else None,
    )


def build_model_and_engine(config: RunConfig, model: ModelConfig, context: RankContext) -> Engine:
    """The part of the model that this rank holds, with its initial values, under DeepSpeed."""
    from megalm.engine.build import build_engine  # imports DeepSpeed (2 s): after the data is known to be good

    kernels = choose_kernels(config.kernels, context.device)
    return build_engine(build_rank_model(config, model, context, kernels), config, context, kernels)


def run_folder(config: RunConfig) -> Path | None:
    """The folder of --save."""
    return Path(config.checkpoint.save) if config.checkpoint.save else None


def open_run_folder(config: RunConfig, context: RankContext) -> TextIO | None:
    """Make, probe and lock the run folder (rank 0 holds it while the returned file is open).

    With --fresh an earlier run's files are set aside.
    """
    folder = run_folder(config)
    if folder is None:
        return None
    on_all_ranks(context.device, lambda: prepare_run_folder(folder))
    lock = on_all_ranks(context.device, lambda: lock_run_folder(folder) if context.rank == 0 else None)
    if config.checkpoint.fresh:
        on_all_ranks(context.device, lambda: set_aside(folder) if context.rank == 0 else None)
    return lock


def identity(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What a checkpoint remembers of the run's inputs, to refuse others on resume (the data: see `Data.order`)."""
    return {"tokenizer": tokenizer.identity if tokenizer else None}
