"""The training loop, read top to bottom: data -> step -> report -> evaluate -> save, until done or asked to stop."""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

from megalm import assembly
from megalm.assembly import Data
from megalm.checkpoint.run_folder import write_config
from megalm.commands.generate import Sampler
from megalm.config import RunConfig, dump_config
from megalm.config.rules.completion import complete_model
from megalm.continuation import Progress, ResumePoint, SampleOrder, Stateful, restore, save
from megalm.data.samples.gpt_dataset import SampleDataset
from megalm.data.samples.source import Padded
from megalm.data.tokenizers import open_tokenizer
from megalm.distributed.collectives import on_all_ranks
from megalm.distributed.context import RankContext
from megalm.distributed.mesh import Axis
from megalm.engine.engine import Engine, StepResult
from megalm.engine.lr_schedule import learning_rate
from megalm.errors import NonFiniteError
from megalm.models.gpt.flops import training_flops_per_token
from megalm.monitor.logger import MetricLogger
from megalm.monitor.throughput import peak_memory_bytes
from megalm.randomness import stable_seed
from megalm.resilience.signals import StopRequest
from megalm.run_summary import describe_run

log = logging.getLogger("megalm")

MAX_BAD_STEPS = 10
"""Skipped steps in a row after which a run without dynamic loss scaling ends."""
EXIT_STOPPED = 75
"""Exit code after a signal asked to stop and the checkpoint was written (EX_TEMPFAIL: run the same command again)."""


@dataclass
class Run:
    """Everything that the loop works on."""

    config: RunConfig
    context: RankContext
    data: Data
    engine: Engine
    metric_logger: MetricLogger
    progress: Progress
    states: list[Stateful]
    """What a checkpoint holds besides tensors."""
    stop: StopRequest
    started: float
    identity: dict[str, Any]
    saved_step: int
    sampler: Sampler | None
    """Continues --sample-prompt."""
    evaluated_step: int = -1

    @property
    def global_batch_size(self) -> int:
        """Samples of one optimizer step."""
        return self.config.batch.global_size(self.context.mesh.size(Axis.DP))

    @property
    def total_iters(self) -> int:
        """Optimizer steps of the whole run."""
        progress = self.progress
        return self.config.training.total_iters(self.global_batch_size, progress.step, progress.consumed_samples)


def pretrain(config: RunConfig, context: RankContext, stop: StopRequest | None = None) -> int:
    """Train as `config` says; the exit code: 0, or EXIT_STOPPED after a signal (`stop` may hold one already).

    Every rank calls it inside the process group.
    """
    stop = stop or StopRequest()
    stop.listen()
    run = build_run(config, context, stop)
    if run.progress.step >= run.total_iters and not config.training.skip_train:
        log.info("already complete: step %d of %d; raise --train-iters to go on", run.progress.step, run.total_iters)
        return 0
    try:
        finished = True if config.training.skip_train else train(run)
        if finished:
            evaluate_at_end(run)
    finally:
        run.metric_logger.close()
    return EXIT_STOPPED if stop.number and not finished else 0


def build_run(config: RunConfig, context: RankContext, stop: StopRequest) -> Run:
    """The parts of the run, in the order in which the data flows, with the checkpoint's state in them."""
    started = time.monotonic()
    folder = assembly.run_folder(config)
    global_batch_size = config.batch.global_size(context.mesh.size(Axis.DP))
    tokenizer = on_all_ranks(context.device, lambda: open_tokenizer(config.tokenizer))
    model = on_all_ranks(context.device, lambda: complete_model(config, tokenizer.vocab_size if tokenizer else None))
    config = config.model_copy(update={"model": model})
    identity = assembly.identity(tokenizer)
    point = on_all_ranks(context.device, lambda: ResumePoint.of(config, identity))
    sampler = on_all_ranks(context.device, lambda: Sampler.of(config, tokenizer))
    progress = Progress()
    order = SampleOrder(progress)
    point.load(progress, order)
    data = on_all_ranks(context.device, lambda: assembly.build_data(config, model, tokenizer, global_batch_size, order))
    order.dataset = data.train
    engine = assembly.build_model_and_engine(config, model, context)
    if len(data.train_names) > 1:
        engine.count_by_dataset(len(data.train_names))
    on_all_ranks(context.device, lambda: restore(engine, config, point))
    states: list[Stateful] = [progress, order, engine.scalars]
    if folder is not None and context.rank == 0:
        write_config(folder, dump_config(config))
    metric_logger = MetricLogger(
        config.logging,
        folder=folder,
        is_main=context.rank == 0,
        resume_step=progress.step,
        resume_samples=progress.consumed_samples,
        total_iters=config.training.total_iters(global_batch_size, progress.step, progress.consumed_samples),
        flops_per_token=training_flops_per_token(model, config.batch.seq_length),
        ranks=context.mesh.world_size,
    )
    metric_logger.show_config(dump_config(config))
    saved_step = progress.step if point.same_run else -1
    run = Run(
        config, context, data, engine, metric_logger, progress, states, stop, started, identity, saved_step, sampler
    )
    log.info(describe_run(run.config, context, data, engine, progress, point.origin))
    return run


def train(run: Run) -> bool:
    """Step until the run is complete (True) or asked to stop (False); either way the last step is saved."""
    training, every = run.config.training, run.config.checkpoint.save_interval
    assert run.data.train is not None
    stop_sample = run.progress.consumed_samples + run.global_batch_size * (run.total_iters - run.progress.step)
    micro_batches = assembly.loader(
        run.config, run.data, run.data.train, run.context, run.progress.consumed_samples, stop_sample,
        run.config.data.num_workers,
    )  # fmt: skip
    with micro_batches:
        reason = None
        while run.progress.step < run.total_iters and reason is None:
            step_once(run, micro_batches)
            step = run.progress.step
            if training.eval_interval and step % training.eval_interval == 0:
                evaluate(run, run.data.valid, "validation")
                show_sample(run)
            reason = stop_reason(run)
            if every and step % every == 0:
                save_now(run)
    save_now(run)
    if reason is not None and run.progress.step < run.total_iters:
        way_on = "run the same command again to continue" if run.config.checkpoint.save else "nothing is saved (--save)"
        log.info("stopped after step %d: %s; %s", run.progress.step, reason, way_on)
        return False
    return True


def step_once(run: Run, micro_batches: Iterator[dict[str, torch.Tensor]]) -> None:
    """One optimizer step: fetch, train, count, report."""
    batch, dp = run.config.batch, run.context.mesh.size(Axis.DP)
    begin = time.monotonic()
    parts = list(islice(micro_batches, batch.accumulation(dp)))
    wait_s = time.monotonic() - begin
    first = run.progress.consumed_samples + run.context.dp_rank * batch.micro_size
    seeds = [
        stable_seed(run.config.training.seed, "dropout", first + number * batch.micro_size * dp)
        for number in range(len(parts))
    ]
    lr = learning_rate(run.progress.step + 1, run.config.optimizer, run.total_iters)
    parts = [assembly.to_device(part, run.context.device) for part in parts]
    result = run.engine.train_step(parts, seeds, lr)
    run.progress.count(result.loss, result.skipped, run.global_batch_size)
    run.metric_logger.step(step_row(run, result, lr), run.global_batch_size * batch.seq_length, wait_s)
    if run.progress.bad_in_a_row >= MAX_BAD_STEPS and not run.config.precision.fp16:
        raise NonFiniteError(
            f"the gradients of the last {MAX_BAD_STEPS} steps were not finite (last good step: "
            f"{run.progress.step - MAX_BAD_STEPS}); lower --lr or look at the data of samples "
            f"{run.progress.consumed_samples - MAX_BAD_STEPS * run.global_batch_size} and on; checkpoints are untouched"
        )


def step_row(run: Run, result: StepResult, lr: float) -> dict[str, float | int]:
    """What is reported of one step."""
    row: dict[str, float | int] = {
        "step": run.progress.step,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": lr,
        "consumed_samples": run.progress.consumed_samples,
        "global_batch_size": run.global_batch_size,
        "loss_scale": result.loss_scale,
        "skipped_iterations": run.progress.skipped_iterations,
        "nan_iterations": run.progress.nan_iterations,
        "memory_bytes": peak_memory_bytes(run.context.device),
    }
    for name, loss in zip(run.data.train_names, result.dataset_losses, strict=False):
        if loss is not None:  # samples of this dataset were in the batch
            row[f"loss/{name}"] = loss
    if run.config.logging.log_params_norm:
        row["params_norm"] = run.engine.parameters_norm()
    return row


def stop_reason(run: Run) -> str | None:
    """Why to stop after this step, agreed by all ranks; None to go on."""
    training, step = run.config.training, run.progress.step
    minutes = (time.monotonic() - run.started) / 60
    over = training.exit_duration_in_mins is not None and minutes >= training.exit_duration_in_mins
    flags = torch.tensor([run.stop.number, int(over)], device=run.context.device)
    if dist.get_world_size() > 1:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    run.stop.number, over = int(flags[0]), bool(flags[1])
    if run.stop.number:
        return f"{run.stop.name} received"
    if over:
        return f"--exit-duration-in-mins {training.exit_duration_in_mins:g} is over"
    if training.exit_interval and step % training.exit_interval == 0:
        return f"--exit-interval {training.exit_interval}"
    return None


def evaluate(run: Run, sets: dict[str, SampleDataset], name: str) -> None:
    """Report the loss on each of `sets`, on the same samples every time, and on all of them together."""
    if not sets or run.config.training.eval_iters == 0:
        return
    run.metric_logger.pause()
    row: dict[str, Any] = {"step": run.progress.step, "consumed_samples": run.progress.consumed_samples}
    total = torch.zeros(2, dtype=torch.float64, device=run.context.device)
    for own_name, dataset in sets.items():
        sums = evaluation_sums(run, dataset, whole=run.config.data.full_validation and name == "validation")
        if own_name:
            row |= loss_and_perplexity(run.engine.mean_over_ranks(sums.clone()), name, f"/{own_name}")
        total += sums
    run.metric_logger.validation(name, row | loss_and_perplexity(run.engine.mean_over_ranks(total), name))
    run.evaluated_step = run.progress.step
    run.metric_logger.resume()


def evaluation_sums(run: Run, dataset: SampleDataset, *, whole: bool) -> torch.Tensor:
    """This rank's (sum of losses, tokens) over the first eval_iters batches of a dataset, or the `whole` of it."""
    size = run.global_batch_size
    if whole or len(dataset) < run.config.training.eval_iters * size:
        dataset = Padded(dataset, size)
    samples = len(dataset) if whole else min(len(dataset), run.config.training.eval_iters * size)
    sums = torch.zeros(2, dtype=torch.float64, device=run.context.device)
    batches = assembly.loader(run.config, run.data, dataset, run.context, 0, samples, workers=0)
    while parts := list(islice(batches, run.config.batch.accumulation(run.context.mesh.size(Axis.DP)))):
        sums += run.engine.eval_step([assembly.to_device(part, run.context.device) for part in parts])
    return sums


def loss_and_perplexity(loss: float, name: str, suffix: str = "") -> dict[str, float]:
    """What is reported of one evaluation."""
    return {f"{name}_loss{suffix}": loss, f"{name}_ppl{suffix}": math.exp(min(loss, 20.0))}


def evaluate_at_end(run: Run) -> None:
    """The last evaluation, on validation and test sets."""
    if run.evaluated_step != run.progress.step:
        evaluate(run, run.data.valid, "validation")
        show_sample(run)
    evaluate(run, {} if run.data.test is None else {"": run.data.test}, "test")


def show_sample(run: Run) -> None:
    """Report how the model continues --sample-prompt."""
    if run.sampler is not None:
        run.metric_logger.pause()
        run.metric_logger.sample(run.progress.step, run.sampler.text(run.engine))
        run.metric_logger.resume()


def save_now(run: Run) -> None:
    """Save this step, unless it is saved already or the run has no folder."""
    if run.config.checkpoint.save is None or run.saved_step == run.progress.step:
        return
    run.metric_logger.pause()
    begin = time.monotonic()
    context, step = run.context, run.progress.step
    path = save(run.engine, run.config, run.identity, step, run.states, str(context.mesh), context.device)
    run.saved_step = run.progress.step
    log.info("saved %s in %.1f s", path, time.monotonic() - begin)
    run.metric_logger.resume()
