"""When a run whose steps go wrong ends, what it does not save, and from where it goes on."""

from megalm.continuation import turn_back
from megalm.errors import NonFiniteError
from megalm.run import Run

MAX_BAD_STEPS = 10
"""Skipped steps in a row after which a run ends whose loss scale does not adapt to them."""


def unsaved_because(run: Run) -> str | None:
    """Why the step at which the run ends or stops is not saved; None: it is.

    Raises:
        NonFiniteError: the run is complete, and has nothing to show for it.
    """
    progress = run.progress
    if progress.is_sound or progress.step == 0:
        return None
    if not progress.nan_in_a_row and _adapts(run) and progress.bad_in_a_row < MAX_BAD_STEPS:
        return None  # so a dynamic loss scale finds its size: the weights are those of the last good step
    why = "its loss is not finite" if progress.nan_in_a_row else "its gradients are not finite"
    if progress.step < run.total_iters:
        return f"{why}; {_way_on(run)}"
    raise NonFiniteError(f"the last step ({progress.step}) is no good: {why}; lower --lr; {_way_on(run)}")


def check_bad_steps(run: Run) -> None:
    """Look whether too many steps were skipped in a row.

    Raises:
        NonFiniteError: they were. Where the loss was not finite from the first step after the last checkpoint on, the
            run goes on from the one before it.
    """
    progress, device = run.progress, run.context.device
    if progress.bad_in_a_row < MAX_BAD_STEPS or (_adapts(run) and progress.nan_in_a_row < MAX_BAD_STEPS):
        return
    good = progress.step - progress.bad_in_a_row
    fix = "give a smaller --loss-scale" if _is_static(run) and not progress.nan_in_a_row else "lower --lr"
    way_on = _way_on(run)
    if run.saved_step == good and progress.nan_in_a_row >= progress.bad_in_a_row:
        before = turn_back(run.config, good, device)
        if before is not None:
            way_on = f"step_{good} gave no finite loss: `latest` names step_{before} again"
    raise NonFiniteError(
        f"the gradients of the last {progress.bad_in_a_row} steps were not finite (last good step: {good}); {fix}, or "
        f"look at the data of samples {progress.consumed_samples - progress.samples_in_a_row} and on; {way_on}"
    )


def _way_on(run: Run) -> str:
    """What is left to go on from."""
    if run.config.checkpoint.save is None:
        return "nothing is saved (--save)"
    return f"the last checkpoint is step_{run.saved_step}" if run.saved_step >= 0 else "there is no checkpoint yet"


def _is_static(run: Run) -> bool:
    return run.config.precision.fp16 and run.config.precision.loss_scale is not None


def _adapts(run: Run) -> bool:
    """Whether skipped steps lower the loss scale; DeepSpeed ends a run whose scale is the smallest already."""
    return run.config.precision.fp16 and run.config.precision.loss_scale is None
