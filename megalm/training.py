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
from megalm.bad_steps import MAX_BAD_STEPS, check_bad_steps, unsaved_because
from megalm.checkpoint.fresh import note_stopped
from megalm.config.sections import RunConfig
from megalm.continuation import prune, save
from megalm.data.batch import Batch
from megalm.distributed.collectives import on_all_ranks, waiting_for_others
from megalm.distributed.context import RankContext
from megalm.engine.engine import StepResult
from megalm.engine.lr_schedule import StepSettings, step_settings
from megalm.errors import CheckpointError, DataError, MegalmError, PlatformError
from megalm.evaluation import evaluate, evaluate_at_end, show_sample
from megalm.monitor.names import named_losses
from megalm.monitor.throughput import peak_memory_bytes
from megalm.processes import begin_collecting
from megalm.resilience.signals import EXIT_STOPPED, StopRequest
from megalm.run import Run
from megalm.run_summary import describe_run

log = logging.getLogger("megalm")


def pretrain(config: RunConfig, context: RankContext, stop: StopRequest | None = None) -> int:
    """Train as `config` says; the exit code: 0, or EXIT_STOPPED after a signal that `stop` takes (default: none).

    Every rank calls it inside the process group.
    """
    stop = stop or StopRequest()
    run = build_run(config, context, stop)
    begin_collecting()
    log.info(describe_run(run))
    if run.progress.step >= run.total_iters and not config.training.skip_train:
        flag = "--" + run.lengths.total.name.replace("_", "-")
        log.info("already complete: step %d of %d; raise %s to go on", run.progress.step, run.total_iters, flag)
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
    start, workers = run.progress.consumed_samples, run.config.data.num_workers
    micro_batches = run.data.batches(run.data.train, start, run.stop_sample, workers=workers)
    with micro_batches:
        reason, due, begin = None, False, run.progress.step
        while run.progress.step < run.total_iters and reason is None:
            with waiting_for_others("the first step") if run.progress.step == begin else nullcontext():
                step_once(run, micro_batches)
            step = run.progress.step
            reason = stop_reason(run)
            due = due or (every is not None and step % every == 0)
            if due and run.progress.is_sound:  # else with the next step that is
                save_now(run, may_fail=True)  # before an evaluation, which may take long
                due = False
            wanted = training.eval_interval and step % training.eval_interval == 0
            if wanted and not (evaluate(run, run.data.valid, "validation") and show_sample(run)):
                reason = stop_reason(run)
    save_last(run)
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
    """Leave in the run folder whether the same command is to continue; a full disk there ends nothing."""
    if run.config.checkpoint.save is None or run.context.rank != 0:
        return
    try:
        note_stopped(Path(run.config.checkpoint.save), stopped)
    except (MegalmError, OSError) as error:
        way_on = "give the same command without --fresh to continue, with it the run begins anew"
        log.warning("whether the run has stopped is not noted: %s; %s", error, way_on)


def step_once(run: Run, micro_batches: Iterator[Batch]) -> None:
    """One optimizer step: fetch, train, count, report."""
    batch, progress = run.config.batch, run.progress
    samples = run.batch_schedule.size(progress.consumed_samples)
    begin = time.monotonic()
    parts = list(islice(micro_batches, samples // (batch.micro_size * run.data.size)))
    wait_s = time.monotonic() - begin
    position = run.lengths.position(progress.step + 1, progress.consumed_samples + samples)
    now = step_settings(position, run.config.optimizer, run.lengths)
    statistics = run.data.statistics(parts) if run.context.rank == 0 else {}  # of this rank's samples
    parts = [part.to(run.context.device) for part in parts]
    result = run.engine.train_step(parts, now.lr, decoupled_lr=now.decoupled_lr, weight_decay=now.weight_decay)
    progress.count(result.loss, result.skipped, samples)
    run.metric_logger.step(step_row(run, result, now, samples) | statistics, samples * batch.seq_length, wait_s)
    check_counts(run, result)
    check_bad_steps(run)
    if progress.is_sound and not run.is_pruned:
        prune_now(run)


def check_counts(run: Run, result: StepResult) -> None:
    """Tokens count: a step without any has loss 0 and trains nothing.

    Raises:
        DataError: none did in the first step of this start, or in MAX_BAD_STEPS in a row.
    """
    first, run.empty_steps = run.empty_steps is None, run.empty_steps or 0
    run.empty_steps = 0 if any(result.counts.values()) else run.empty_steps + 1
    if run.empty_steps >= (1 if first else MAX_BAD_STEPS):
        raise DataError(
            f"no token of the samples up to {run.progress.consumed_samples} counts for the loss: all are masked; look "
            "at the data, or drop --eod-mask-loss"
        )


def step_row(run: Run, result: StepResult, settings: StepSettings, samples: int) -> dict[str, float | int]:
    """What is reported of one step of so many samples."""
    row: dict[str, float | int] = {
        "step": run.progress.step,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": settings.lr,
        "consumed_samples": run.progress.consumed_samples,
        "global_batch_size": samples,
        "loss_scale": result.loss_scale,
        "skipped_iterations": run.progress.skipped_iterations,
        "nan_iterations": run.progress.nan_iterations,
        "memory_bytes": peak_memory_bytes(run.context.device),
    }
    optimizer = run.config.optimizer
    if optimizer.decoupled_lr is not None:
        row["decoupled_learning_rate"] = settings.decoupled_lr
    if optimizer.weight_decay_incr_style != "constant":
        row["weight_decay"] = settings.weight_decay
    row |= named_losses(result.losses)
    for name, loss in zip(run.data.train_names, result.losses_of.get("dataset_id", ()), strict=False):
        if loss is not None:  # samples of this dataset were in the batch
            row[f"loss/{name}"] = loss
    for name, loss in zip(run.config.training.objectives, result.losses_of.get("objective_id", ()), strict=False):
        if loss is not None:
            row[f"{name}_loss"] = loss
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


def save_now(run: Run, *, may_fail: bool = False) -> None:
    """Save this step, unless it is saved already or the run has no folder.

    A save that `may_fail` is tried again at the next interval if the disk refuses it; the run goes on meanwhile.

    Raises:
        MegalmError: the checkpoint could not be written, on every rank.
    """
    if run.config.checkpoint.save is None or run.saved_step == run.progress.step:
        return
    run.metric_logger.pause()
    begin = time.monotonic()
    context, step = run.context, run.progress.step
    try:
        path = save(run.engine, run.config, run.identity, step, run.states, str(context.mesh), context.device)
        run.saved_step, run.is_pruned = step, False
        log.info("saved %s in %.1f s", path, time.monotonic() - begin)
    except MegalmError as error:
        if not may_fail or error.lasting or error.exit_code not in (CheckpointError.exit_code, PlatformError.exit_code):
            raise
        log.warning("step %d is not saved: %s; training goes on, and the next save tries again", step, error)
    run.metric_logger.resume()


def save_last(run: Run) -> None:
    """Save the step at which the run ends or stops, if it is one to go on from."""
    why = unsaved_because(run)
    if why is None:
        save_now(run)
        prune_now(run)
    elif run.config.checkpoint.save is not None:
        log.warning("step %d is not saved: %s", run.progress.step, why)


def prune_now(run: Run) -> None:
    """Remove the checkpoints that the last one has made superfluous."""
    if not run.is_pruned:
        prune(run.config, run.saved_step, run.context.device)
        run.is_pruned = True
