"""Lines for people: one progress line per interval, evaluations, samples."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from megalm.config.output import LoggingConfig
from megalm.monitor.names import NOT_A_NAMED_LOSS
from megalm.monitor.sinks.base import Cadence, RunFacts
from megalm.monitor.tables import duration

log = logging.getLogger("megalm")

_EVALUATED = re.compile(r"(\w+)_loss(/.*)?")


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
            match, ppl = _EVALUATED.fullmatch(key), values.get(key.replace("_loss", "_ppl", 1))
            if match and ppl is not None:
                log.info(validation_line(step, loss, ppl, match[1] + (match[2] or "").replace("/", " ", 1)))

    def text(self, name: str, text: str, step: int) -> None:
        """What the model writes."""
        if name != "config":
            log.info(" %s at iteration %d | %s", name, step, text)

    def close(self) -> None:
        """Nothing is queued."""


def progress_line(row: Mapping[str, Any], total_iters: int, remaining_s: float) -> str:
    """One line for one logged step, in the order and words of Megatron-LM's log, which people parse."""
    named = [key for key in row if key.endswith("_loss") and key not in NOT_A_NAMED_LOSS]
    fields = [
        f" iteration {row['step']:8d}/{total_iters:8d}",
        f"consumed samples: {row['consumed_samples']:12d}",
        f"elapsed time per iteration (ms): {1000 * row['iteration_time_s']:.1f}",
        f"learning rate: {row['learning_rate']:.6E}",
        f"global batch size: {row['global_batch_size']:5d}",
        f"{'all losses' if named else 'lm loss'}: {row['loss']:.6E}",
        *(f"{key.removesuffix('_loss')} loss: {row[key]:.6E}" for key in named),
        f"loss scale: {row['loss_scale']:.1f}",
        f"grad norm: {row['grad_norm']:.3f}",
        f"number of skipped iterations: {row['skipped_iterations']:3d}",
        f"number of nan iterations: {row['nan_iterations']:3d}",
        f"tokens/s: {row['tokens_per_s']:,.0f}",
        f"ETA: {duration(remaining_s)}",
    ]
    return " | ".join(fields) + " |"


def validation_line(step: int, loss: float, perplexity: float, name: str = "validation") -> str:
    """One line for one evaluation."""
    return f" {name} loss at iteration {step} | lm loss value: {loss:.6E} | lm loss PPL: {perplexity:.6E} |"
