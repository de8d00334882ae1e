"""What is measured between steps: the loss on validation and test sets, and a sample of what the model writes."""

import math
from itertools import islice
from typing import Any

import torch

from megalm.data.samples.sample import SampleDataset
from megalm.data.samples.source import Padded
from megalm.errors import DataError
from megalm.monitor.names import named_losses
from megalm.run import Run


def evaluate(run: Run, sets: dict[str, SampleDataset], name: str) -> bool:
    """Report the loss on each of `sets`, on the same samples every time, and on all of them together.

    False where a stop signal came: nothing is reported then.
    """
    if not sets or run.config.training.eval_iters == 0:
        return True
    run.metric_logger.pause()
    row: dict[str, Any] = {"step": run.progress.step, "consumed_samples": run.progress.consumed_samples}
    total = run.engine.evaluation_sums()
    for own_name, dataset in sets.items():
        sums = evaluation_sums(run, dataset, whole=run.config.data.full_validation and name == "validation")
        if sums is None:
            run.metric_logger.resume()
            return False
        if own_name:
            row |= evaluated_losses(run, sums.clone(), name, f"/{own_name}")
        total += sums
    run.metric_logger.evaluation(row | evaluated_losses(run, total, name))
    run.evaluated_step = run.progress.step
    run.metric_logger.resume()
    return True


def evaluation_sums(run: Run, dataset: SampleDataset, *, whole: bool) -> torch.Tensor | None:
    """This rank's sums and counts of losses over the first eval_iters batches of a dataset, or the `whole` of it.

    None where a stop signal came to any rank: it is looked for before every global batch.
    """
    micro_batch_size, size = run.config.eval_sizes(run.data.size)
    if whole or len(dataset) < run.config.training.eval_iters * size:
        dataset = Padded(dataset, size)
    samples = len(dataset) if whole else min(len(dataset), run.config.training.eval_iters * size)
    sums = run.engine.evaluation_sums()
    batches = run.data.batches(dataset, 0, samples, workers=0)
    with run.engine.evaluation():
        while parts := list(islice(batches, size // (micro_batch_size * run.data.size))):
            if run.asked_to_stop():
                return None
            sums += run.engine.eval_step([part.to(run.context.device) for part in parts])
    return sums


def evaluated_losses(run: Run, sums: torch.Tensor, name: str, suffix: str = "") -> dict[str, float]:
    """What is reported of one evaluation, from every rank's sums and counts: the loss, and each that is part of it."""
    losses = run.engine.mean_over_ranks(sums)  # and `sums` is now that of all ranks
    if not sums[1].any():
        raise DataError(
            f"no token of the {name} set{suffix.replace('/', ' ')} counts for the loss: all are masked; look at the "
            "data, or drop --eod-mask-loss"
        )
    loss = run.engine.total_loss(losses)
    row = {f"{name}_loss{suffix}": loss}
    if (entropy := losses.get("lm", loss if len(losses) == 1 else None)) is not None:  # of tokens alone
        row[f"{name}_ppl{suffix}"] = math.exp(min(entropy, 20.0))
    kinds = zip(run.config.training.objectives, run.engine.mean_of_kinds(sums).get("objective_id", ()), strict=False)
    row |= {f"{name}_{objective}_loss{suffix}": loss for objective, loss in kinds if loss is not None}
    return row | named_losses(losses, f"{name}_", suffix)


def evaluate_at_end(run: Run) -> bool:
    """The last evaluation, on validation and test sets; False where a stop signal cut it short."""
    if run.evaluated_step != run.progress.step and not (
        evaluate(run, run.data.valid, "validation") and show_sample(run)
    ):
        return False
    return evaluate(run, {} if run.data.test is None else {"": run.data.test}, "test")


def show_sample(run: Run) -> bool:
    """Report what the model makes of --sample-prompt; False where a stop signal cut it short."""
    if run.sampler is None:
        return True
    run.metric_logger.pause()
    text = run.sampler.text(run.engine, run.asked_to_stop)
    if text is not None:
        run.metric_logger.text("sample", text, run.progress.step)
    run.metric_logger.resume()
    return text is not None
