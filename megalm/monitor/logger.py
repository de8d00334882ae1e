"""One place to report to: the terminal, metrics.jsonl and TensorBoard, each at its own interval."""

import logging
from pathlib import Path
from typing import Any

from megalm.config.output import LoggingConfig
from megalm.monitor.sinks.jsonl import MetricsFile
from megalm.monitor.sinks.terminal import progress_line, validation_line
from megalm.monitor.throughput import Throughput

log = logging.getLogger("megalm")


class MetricLogger:
    """What rank 0 reports; on the other ranks every call does nothing.

    TensorBoard is imported with the first point, so that the first step does not wait for it.
    """

    def __init__(
        self,
        config: LoggingConfig,
        *,
        folder: Path | None,
        is_main: bool,
        resume_step: int,
        resume_samples: int,
        total_iters: int,
        flops_per_token: float,
        ranks: int,
    ) -> None:
        self._config, self._is_main = config, is_main
        self._resume_step, self._resume_samples, self._total_iters = resume_step, resume_samples, total_iters
        self._for_lines = Throughput(flops_per_token, ranks)
        self._for_points = Throughput(flops_per_token, ranks)
        events = config.tensorboard_dir or (folder / "tensorboard" if folder else None)
        self._events = Path(events) if events and is_main else None
        self._tensorboard: Any = None
        self._metrics = MetricsFile(folder / "metrics.jsonl", resume_step=resume_step) if folder and is_main else None
        self._text = ""

    def show_config(self, text: str) -> None:
        """Keep the configuration for TensorBoard's Text tab."""
        self._text = text

    def step(self, row: dict[str, Any], tokens: int, data_wait_s: float) -> None:
        """Report one training step: `row` holds step, consumed_samples, loss, grad_norm, learning_rate, ...

        metrics.jsonl and the terminal get it at log_interval, at the first and at the last step.
        """
        for meter in (self._for_lines, self._for_points):
            meter.add(tokens, data_wait_s)
        number = row["step"]
        if number % self._config.tensorboard_log_interval == 0:
            self._to_tensorboard(row | self._for_points.read())
            self._for_points.restart()
        edge = number in (self._resume_step + 1, self._total_iters)
        if number % self._config.log_interval == 0 or edge:
            speed = self._for_lines.read()
            self._for_lines.restart()
            self._to_metrics(row | speed)
            if self._is_main:
                remaining = speed["iteration_time_s"] * (self._total_iters - number)
                log.info(progress_line(row | speed, self._total_iters, remaining))

    def validation(self, name: str, row: dict[str, Any]) -> None:
        """Report one evaluation: `row` holds step, consumed_samples, {name}_loss and {name}_ppl.

        {name}_loss/SET and {name}_ppl/SET are those of one of several sets.
        """
        self._to_metrics(row)
        self._to_tensorboard(row)
        if self._is_main:
            for key in row:
                if key.startswith(f"{name}_loss"):
                    own = key.removeprefix(f"{name}_loss").replace("/", " ", 1)
                    log.info(validation_line(row["step"], row[key], row[key.replace("loss", "ppl", 1)], name + own))

    def sample(self, step: int, text: str) -> None:
        """Report text that the model has written."""
        if self._is_main:
            log.info(" sample at iteration %d | %s", step, text)
        if self._tensorboard is not None:
            self._tensorboard.write_text("sample", text, step)

    def pause(self) -> None:
        """What follows until `resume` is not training time."""
        self._for_lines.pause()
        self._for_points.pause()

    def resume(self) -> None:
        """Training goes on."""
        self._for_lines.resume()
        self._for_points.resume()

    def close(self) -> None:
        """Write what is still queued."""
        for sink in (self._metrics, self._tensorboard):
            if sink is not None:
                sink.close()

    def _to_metrics(self, row: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.write(row)

    def _to_tensorboard(self, row: dict[str, Any]) -> None:
        if self._events is None:
            return
        if self._tensorboard is None:
            from megalm.monitor.sinks.tensorboard import TensorBoard

            self._tensorboard = TensorBoard(
                self._events,
                resume_step=self._resume_step,
                resume_samples=self._resume_samples,
                queue_size=self._config.tensorboard_queue_size,
            )
            self._tensorboard.write_config(self._text)
        self._tensorboard.write(row)
