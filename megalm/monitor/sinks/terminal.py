"""Lines for people: one progress line per interval, evaluations, samples."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from megalm.config.output import LoggingConfig
from megalm.monitor.names import losses_of
from megalm.monitor.sinks.base import Cadence, RunFacts
from megalm.monitor.tables import duration

log = logging.getLogger("megalm")

NO_NAMES: Mapping[str, float] = {}
_EVALUATED = re.compile(r"(validation|test)_loss(/.*)?")


class TerminalSink:
    """Lines in the terminal and in the log of rank 0."""

    def __init__(self, total_iters: int, cadence: Cadence) -> None:
        self.cadence = cadence
        self._total_iters = total_iters

    @classmethod
    def build(cls, config: LoggingConfig, facts: RunFacts) -> "TerminalSink":
        """The sink of any run."""
        return cls(facts.total_iters, Cadence(config.log_interval, at_ends=True))

    def row(self, step: int, values: Mapping[str, Any]) -> None:
        """A progress line, or a line for each loss of an evaluation."""
        if "loss" in values:
            remaining = values["iteration_time_s"] * (self._total_iters - step)
            log.info(progress_line(values, self._total_iters, remaining))
            return
        for key, loss in values.items():
            if match := _EVALUATED.fullmatch(key):
                kind, suffix = match[1], match[2] or ""
                named = losses_of(values, f"{kind}_", suffix)
                perplexity = values.get(f"{kind}_ppl{suffix}")
                log.info(validation_line(step, loss, perplexity, kind + suffix.replace("/", " ", 1), named))

    def text(self, name: str, text: str, step: int) -> None:
        """What the model writes."""
        if name != "config":
            log.info(" %s at iteration %d | %s", name, step, text)

    def close(self) -> None:
        """Nothing is queued."""


def progress_line(row: Mapping[str, Any], total_iters: int, remaining_s: float) -> str:
    """One line for one logged step, in the order and words of Megatron-LM's log, which people parse."""
    named = losses_of(row)
    fields = [
        f" iteration {row['step']:8d}/{total_iters:8d}",
        f"consumed samples: {row['consumed_samples']:12d}",
        f"elapsed time per iteration (ms): {1000 * row['iteration_time_s']:.1f}",
        f"learning rate: {row['learning_rate']:.6E}",
        f"global batch size: {row['global_batch_size']:5d}",
        f"{'all losses' if named else 'lm loss'}: {row['loss']:.6E}",
        *(f"{name} loss: {loss:.6E}" for name, loss in named.items()),
        f"loss scale: {row['loss_scale']:.1f}",
        f"grad norm: {row['grad_norm']:.3f}",
        f"number of skipped iterations: {row['skipped_iterations']:3d}",
        f"number of nan iterations: {row['nan_iterations']:3d}",
        f"tokens/s: {row['tokens_per_s']:,.0f}",
        f"ETA: {duration(remaining_s)}",
    ]
    return " | ".join(fields) + " |"


def validation_line(
    step: int, loss: float, perplexity: float | None, name: str = "validation", named: Mapping[str, float] = NO_NAMES
) -> str:
    """One line for one evaluation; `named` are the losses that the loss is the sum of, where there are several."""
    parts = [f" {name} loss at iteration {step}", *([f"total loss value: {loss:.6E}"] if named else [])]
    for kind, value in (named or {"lm": loss}).items():
        parts.append(f"{kind} loss value: {value:.6E}")
        if kind == "lm" and perplexity is not None:
            parts.append(f"lm loss PPL: {perplexity:.6E}")
    return " | ".join(parts) + " |"
