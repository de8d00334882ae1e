"""One place to report to: rows and texts go to every sink, each at its own cadence.

A sink that fails is said once and goes on being asked, in case the disk has room again; training never ends for it.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from megalm.monitor.sinks import Cadence, RunFacts, Sink
from megalm.monitor.sinks.failures import failure_of
from megalm.monitor.throughput import Throughput

log = logging.getLogger("megalm")


class MetricLogger:
    """What rank 0 reports; on the other ranks, which have no sinks, every call does nothing.

    Sinks of one cadence are given the same speed.
    """

    def __init__(self, sinks: Sequence[Sink], facts: RunFacts, *, flops_per_token: float, ranks: int) -> None:
        self._sinks, self._facts = list(sinks), facts
        self._failed: set[int] = set()
        """Numbers of sinks that have failed."""
        cadences = dict.fromkeys(sink.cadence for sink in self._sinks)
        self._meters = {cadence: Throughput(flops_per_token, ranks) for cadence in cadences}

    def step(self, row: dict[str, Any], tokens: int, data_wait_s: float) -> None:
        """Report one training step: `row` holds step, consumed_samples, loss, grad_norm, learning_rate, ..."""
        for cadence, meter in self._meters.items():
            meter.add(tokens, data_wait_s)
            if not self._is_due(cadence, row["step"]):
                continue
            values = row | meter.read()
            meter.restart()
            self._tell(lambda sink: sink.row(row["step"], values), cadence)  # noqa: B023 (called at once)

    def evaluation(self, row: dict[str, Any]) -> None:
        """Report one evaluation: `row` holds step, consumed_samples, validation_loss, validation_ppl, ..."""
        self._tell(lambda sink: sink.row(row["step"], row))

    def text(self, name: str, text: str, step: int = 0) -> None:
        """Report the configuration ("config") or text that the model has written ("sample")."""
        self._tell(lambda sink: sink.text(name, text, step))

    def pause(self) -> None:
        """What follows until `resume` is not training time."""
        for meter in self._meters.values():
            meter.pause()

    def resume(self) -> None:
        """Training goes on."""
        for meter in self._meters.values():
            meter.resume()

    def close(self) -> None:
        """Write what is still queued."""
        self._tell(lambda sink: sink.close())

    def _tell(self, what: Callable[[Sink], None], cadence: Cadence | None = None) -> None:
        """Do something with every sink, or with those of one cadence."""
        for number, sink in enumerate(self._sinks):
            if cadence is not None and sink.cadence != cadence:
                continue
            try:
                what(sink)
            except Exception as error:
                if number not in self._failed:
                    self._failed.add(number)
                    log.warning("%s; training goes on without it", failure_of(type(sink).__name__, error))

    def _is_due(self, cadence: Cadence, step: int) -> bool:
        ends = (self._facts.resume_step + 1, self._facts.total_iters) if cadence.at_ends else ()
        return step % cadence.interval == 0 or step in ends
