"""One place to report to: rows and texts go to every sink, each at its own cadence."""

from collections.abc import Sequence
from typing import Any

from megalm.monitor.sinks import Cadence, RunFacts, Sink
from megalm.monitor.throughput import Throughput


class MetricLogger:
    """What rank 0 reports; on the other ranks, which have no sinks, every call does nothing.

    Sinks of one cadence are given the same speed.
    """

    def __init__(self, sinks: Sequence[Sink], facts: RunFacts, *, flops_per_token: float, ranks: int) -> None:
        self._sinks, self._facts = list(sinks), facts
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
            for sink in self._sinks:
                if sink.cadence == cadence:
                    sink.row(row["step"], values)

    def evaluation(self, row: dict[str, Any]) -> None:
        """Report one evaluation: `row` holds step, consumed_samples, validation_loss, validation_ppl, ..."""
        for sink in self._sinks:
            sink.row(row["step"], row)

    def text(self, name: str, text: str, step: int = 0) -> None:
        """Report the configuration ("config") or text that the model has written ("sample")."""
        for sink in self._sinks:
            sink.text(name, text, step)

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
        for sink in self._sinks:
            sink.close()

    def _is_due(self, cadence: Cadence, step: int) -> bool:
        ends = (self._facts.resume_step + 1, self._facts.total_iters) if cadence.at_ends else ()
        return step % cadence.interval == 0 or step in ends
