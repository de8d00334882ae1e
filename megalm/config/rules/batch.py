"""The micro-batch size of a run that gives none: it follows from the global batch, the ranks and the schedule."""

from megalm.config.model import divisors_of
from megalm.config.rules.pipeline import micro_batch_problems, num_stages
from megalm.config.sections import RunConfig


def with_micro_batch_size(config: RunConfig, data_parallel_size: int) -> RunConfig:
    """The run with its micro-batch size on so many data-parallel ranks; `layout_problems` has found it possible."""
    if config.batch.micro_batch_size is not None:
        return config
    size = derived_micro_batch_size(config, data_parallel_size)
    return config.model_copy(update={"batch": config.batch.model_copy(update={"micro_batch_size": size})})


def derived_micro_batch_size(config: RunConfig, data_parallel_size: int) -> int:
    """The largest that gives a pipeline a micro-batch for each of its stages; without a pipeline a rank's whole share.

    The latter is DeepSpeed's rule for a JSON that says `train_batch_size` alone. Where the share has too few samples
    for every stage to get one, it is the size that makes the most micro-batches that the schedule can do. Where the
    batch size changes, what all its sizes are multiples of is split.
    """
    parallel, layers, steps = config.parallel, config.model.total_layers, config.batch.gradient_accumulation_steps
    share = config.batch.schedule(data_parallel_size).divisor // data_parallel_size
    if steps is not None:
        return max(1, share // steps)
    wanted = num_stages(parallel, layers) if parallel.pipeline_model_parallel_size > 1 else 1
    counts = divisors_of(share)
    possible = [count for count in counts if not micro_batch_problems(parallel, layers, count)]
    enough = [count for count in possible if count >= wanted]
    return share // (enough[0] if enough else (possible or counts)[-1])


def derived_split_problems(config: RunConfig, data_parallel_size: int) -> list[str]:
    """Why a global batch cannot be split into micro-batches of any size."""
    batch, dp = config.batch, data_parallel_size
    total, steps = batch.schedule(dp).divisor, batch.gradient_accumulation_steps
    factor = dp * (steps or 1)
    name = "global_batch_size" if len(batch.schedule(dp).sizes) == 1 else "the largest divisor of all batch sizes"
    if total % factor:
        below = total // factor * factor
        nearest = f"{below} or {below + factor}" if below else str(factor)
        return [
            f"{name}={total} = micro_batch_size ? x dp {dp} x accumulation {steps or '?'} has no solution: "
            f"it must be a multiple of {factor}; use {nearest}"
        ]
    count = total // (dp * derived_micro_batch_size(config, dp))
    return micro_batch_problems(config.parallel, config.model.total_layers, count)
