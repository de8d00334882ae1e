"""The training loop, read top to bottom: data -> step -> report -> evaluate -> save, until done or asked to stop."""

import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

from megalm.assembly import build_run
from megalm.checkpoint.fresh import note_stopped
from megalm.config import RunConfig
from megalm.continuation import save
from megalm.data.batch import Batch
from megalm.distributed.collectives import on_all_ranks, waiting_for_others
from megalm.distributed.context import RankContext
from megalm.engine.engine import StepResult
from megalm.engine.lr_schedule import learning_rate
from megalm.errors import NonFiniteError
from megalm.evaluation import evaluate, evaluate_at_end, named_losses, show_sample
from megalm.monitor.throughput import peak_memory_bytes
from megalm.resilience.signals import EXIT_STOPPED, StopRequest
from megalm.run import Run
from megalm.run_summary import describe_run

log = logging.getLogger("megalm")

MAX_BAD_STEPS = 10
"""Skipped steps in a row after which a run without dynamic loss scaling ends."""


def pretrain(config: RunConfig, context: RankContext, stop: StopRequest | None = None) -> int:
    """Train as `config` says; the exit code: 0, or EXIT_STOPPED after a signal that `stop` takes (default: none).

    Every rank calls it inside the process group.
    """
    stop = stop or StopRequest()
    run = build_run(config, context, stop)
    log.info(describe_run(run))
    if run.progress.step >= run.total_iters and not config.training.skip_train:
        log.info("already complete: step %d of %d; raise --train-iters to go on", run.progress.step, run.total_iters)
        return 0
    try:
        finished = True if config.training.skip_train else train(run)
        if finished and not evaluate_at_end(run):
            log.info("%s received: the evaluation after training is cut short; --skip-train does it", stop.name)
            finished = False
    finally:
        run.metric_logger.close()
    return EXIT_STOPPED if stop.number and not finished else 0


def train(run: Run) -> bool:
    """Step until the run is complete (True) or asked to stop (False); either way the last step is saved."""
    begin_training(run)
    training, every = run.config.training, run.config.checkpoint.save_interval
    assert run.data.train is not None
    stop_sample = run.progress.consumed_samples + run.global_batch_size * (run.total_iters - run.progress.step)
    start = run.progress.consumed_samples
    micro_batches = run.data.batches(run.data.train, start, stop_sample, workers=run.config.data.num_workers)
    with micro_batches:
        reason, begin = None, run.progress.step
        while run.progress.step < run.total_iters and reason is None:
            with waiting_for_others("the first step") if run.progress.step == begin else nullcontext():
                step_once(run, micro_batches)
            step = run.progress.step
            reason = stop_reason(run)
            if every and step % every == 0:
                save_now(run)  # before an evaluation, which may take long
            due = training.eval_interval and step % training.eval_interval == 0
            if due and not (evaluate(run, run.data.valid, "validation") and show_sample(run)):
                reason = stop_reason(run)
    save_now(run)
    if reason is not None and run.progress.step < run.total_iters:
        way_on = "run the same command again to continue" if run.config.checkpoint.save else "nothing is saved (--save)"
        log.info("stopped after step %d: %s; %s", run.progress.step, reason, way_on)
        note_stop(run, True)
        return False
    return True


def begin_training(run: Run) -> None:
    """From here on a stop signal, to whichever rank, ends the run only after a save."""
    on_all_ranks(run.context.device, lambda: None, "the start of training")
    run.stop.hold()
    note_stop(run, False)


def note_stop(run: Run, stopped: bool) -> None:
    """Leave in the run folder whether the same command is to continue."""
    if run.config.checkpoint.save is not None and run.context.rank == 0:
        note_stopped(Path(run.config.checkpoint.save), stopped)


def step_once(run: Run, micro_batches: Iterator[Batch]) -> None:
    """One optimizer step: fetch, train, count, report."""
    batch = run.config.batch
    begin = time.monotonic()
    parts = list(islice(micro_batches, run.accumulation))
    wait_s = time.monotonic() - begin
    lr = learning_rate(run.progress.step + 1, run.config.optimizer, run.total_iters)
    parts = [part.to(run.context.device) for part in parts]
    result = run.engine.train_step(parts, lr)
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
    row |= named_losses(result.losses)
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
    over = bool(flags[1])
    if run.stop.agree(int(flags[0])):
        return f"{run.stop.name} received"
    if over:
        return f"--exit-duration-in-mins {training.exit_duration_in_mins:g} is over"
    if training.exit_interval and step % training.exit_interval == 0:
        return f"--exit-interval {training.exit_interval}"
    return None


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
