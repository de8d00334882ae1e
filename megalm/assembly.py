"""The parts of a run, built from its configuration in the order in which the data flows."""

import time
from pathlib import Path

from megalm.checkpoint.run_folder import write_config
from megalm.commands.sampler import build_sampler
from megalm.config.lengths import Lengths
from megalm.config.merging.dump import dump_config
from megalm.config.model import ModelConfig
from megalm.config.rules.completion import complete_model
from megalm.config.sections import RunConfig
from megalm.continuation import ResumePoint, identity_of, prove_room, restore
from megalm.data.run_data import RunData
from megalm.data.tokenizers import Tokenizer, open_tokenizer
from megalm.distillation import with_teacher
from megalm.distributed.collectives import on_all_ranks, waiting_for_others
from megalm.distributed.context import RankContext
from megalm.engine.engine import Engine
from megalm.models.families import FAMILIES
from megalm.monitor.logger import MetricLogger
from megalm.monitor.sinks import RunFacts, build_sinks
from megalm.objectives import build_objective
from megalm.parallel.build import build_rank_model
from megalm.parallel.kernels import choose_kernels
from megalm.resilience.signals import StopRequest
from megalm.run import Run
from megalm.run_state import Progress, SampleOrder


def build_run(config: RunConfig, context: RankContext, stop: StopRequest) -> Run:
    """The parts of the run, in the order in which the data flows, with the checkpoint's state in them."""
    started, device = time.monotonic(), context.device
    tokenizer = on_all_ranks(device, lambda: open_tokenizer(config.tokenizer))
    model = on_all_ranks(device, lambda: complete_model(config, tokenizer.vocab_size if tokenizer else None))
    config = config.model_copy(update={"model": model})
    identity = identity_of(config, tokenizer.identity if tokenizer else None, context)
    point = on_all_ranks(device, lambda: ResumePoint.of(config, identity))
    sampler = on_all_ranks(device, lambda: build_sampler(config, tokenizer))
    progress = Progress()
    order = SampleOrder(progress)
    point.load(progress, order)
    total_iters, stop_sample = run_end(config, context.groups.data.size, progress)
    data = on_all_ranks(device, lambda: build_data(config, context, tokenizer, order, stop_sample), "indexing the data")
    order.dataset = data.train
    with waiting_for_others("building the engine"):
        engine = build_model_and_engine(config, model, context)
    for name, mixed in (("dataset_id", data.train_names), ("objective_id", config.training.objectives)):
        if len(mixed) > 1:
            engine.tell_apart(name, len(mixed), evaluated=name == "objective_id")
    prove_room(engine, config)
    restore(engine, config, point)
    return Run(
        config=config,
        context=context,
        data=data,
        engine=engine,
        metric_logger=build_metric_logger(config, context, progress, total_iters),
        progress=progress,
        states=[progress, order, engine.scalars],
        sampler=sampler,
        stop=stop,
        identity=identity,
        origin=point.origin,
        total_iters=total_iters,
        stop_sample=stop_sample,
        started=started,
        saved_step=progress.step if point.same_run else -1,
    )


def run_end(config: RunConfig, data_parallel_size: int, progress: Progress) -> tuple[int, int]:
    """(steps of the whole run, the sample at which the last one ends), `progress` of which is done."""
    lengths = Lengths.of(config, config.batch.global_size(data_parallel_size))
    return lengths.end(config.batch.schedule(data_parallel_size), progress.step, progress.consumed_samples)


def build_data(
    config: RunConfig, context: RankContext, tokenizer: Tokenizer | None, order: SampleOrder, stop_sample: int
) -> RunData:
    """The datasets of the run, training samples up to `stop_sample`; they go on as `order` says."""
    return RunData.build(
        config,
        tokenizer,
        build_objective(config, tokenizer),
        rank=context.groups.data.rank,
        size=context.groups.data.size,
        pin_memory=context.device.type == "cuda",
        trained_samples=stop_sample,
        record=order.record,
        speaks=context.groups.is_first_with_samples,
        verify=context.rank == 0,
    )


def build_metric_logger(config: RunConfig, context: RankContext, progress: Progress, total_iters: int) -> MetricLogger:
    """Where the run reports to; the run folder gets the merged configuration too."""
    folder = Path(config.checkpoint.save) if config.checkpoint.save else None
    facts = RunFacts(
        folder=folder, resume_step=progress.step, resume_samples=progress.consumed_samples, total_iters=total_iters
    )
    is_main, text = context.rank == 0, dump_config(config)
    if is_main and folder is not None:
        write_config(folder, text)
    flops = FAMILIES[config.model.model_family].training_flops_per_token(
        config.model, config.batch.seq_length, config.model.padded_vocab_size(context.mesh.tp)
    )
    sinks = build_sinks(config.logging, facts) if is_main else []
    logger = MetricLogger(sinks, facts, flops_per_token=flops, ranks=context.mesh.world_size)
    logger.text("config", text)
    return logger


def build_model_and_engine(config: RunConfig, model: ModelConfig, context: RankContext) -> Engine:
    """The part of the model that this rank holds, with its initial values, under DeepSpeed."""
    from megalm.engine.build import build_engine  # imports DeepSpeed (2 s): after the data is known to be good

    kernels = choose_kernels(config.kernels, context.device)
    rank_model = with_teacher(build_rank_model(config, model, context, kernels), config, context, kernels)
    return build_engine(rank_model, config, context, kernels)
