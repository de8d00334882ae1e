"""TensorBoard scalars under Megatron-LM's tags, each also over consumed samples ("... vs samples")."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megalm.config.output import LoggingConfig
from megalm.monitor.names import is_over_samples, tag_of
from megalm.monitor.sinks.base import EVERY_STEP, Cadence, RunFacts


class TensorBoardSink:
    """Writes rows as scalars; what an earlier start wrote past the resume point vanishes.

    The "vs samples" twins are in a folder of their own, since a purge drops all points past one number: step 5 would
    take the samples 8, 16, ... with it. TensorBoard is imported with the first point, so that the first step does not
    wait for it.
    """

    def __init__(
        self, folder: Path, *, resume_step: int, resume_samples: int, queue_size: int, cadence: Cadence = EVERY_STEP
    ) -> None:
        self.cadence = cadence
        self._folder, self._queue_size = folder, queue_size
        self._purge_step, self._purge_samples = resume_step + 1, resume_samples + 1
        self._writers: tuple[Any, Any] | None = None
        self._config: str | None = None

    @classmethod
    def build(cls, config: LoggingConfig, facts: RunFacts) -> "TensorBoardSink | None":
        """The sink of a run with a folder, or with --tensorboard-dir."""
        folder = config.tensorboard_dir or (facts.folder / "tensorboard" if facts.folder else None)
        if folder is None:
            return None
        return cls(
            Path(folder),
            resume_step=facts.resume_step,
            resume_samples=facts.resume_samples,
            queue_size=config.tensorboard_queue_size,
            cadence=Cadence(config.tensorboard_log_interval),
        )

    def row(self, step: int, values: Mapping[str, Any]) -> None:
        """Add one point for each known metric; "loss/NAME" is the loss of one dataset, tag "lm loss NAME"."""
        with self._folder_named():
            over_steps, over_samples = self._open()
            for key, value in values.items():
                tag = tag_of(key)
                if tag is None:
                    continue
                over_steps.add_scalar(tag, value, step)
                if is_over_samples(key):
                    over_samples.add_scalar(f"{tag} vs samples", value, values["consumed_samples"])

    def text(self, name: str, text: str, step: int) -> None:
        """Show text in the Text tab; the configuration comes with the first point."""
        if name == "config":
            self._config = text
            return
        with self._folder_named():
            self._open()[0].add_text(name, text, step)

    def close(self) -> None:
        """Write what is still queued."""
        with self._folder_named():
            for writer in self._writers or ():
                writer.close()

    @contextlib.contextmanager
    def _folder_named(self) -> Iterator[None]:
        """What the system says of an event file names the folder."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._folder)) from error

    def _open(self) -> tuple[Any, Any]:
        if self._writers is None:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = _quiet_writers
            options = {"max_queue": self._queue_size, "flush_secs": 10}
            self._writers = (
                SummaryWriter(str(self._folder), purge_step=self._purge_step, **options),
                SummaryWriter(str(self._folder / "vs_samples"), purge_step=self._purge_samples, **options),
            )
            if self._config is not None:
                self._writers[0].add_text("config", "```yaml\n" + self._config + "\n```")
        return self._writers


def _quiet_writers(failed: Any, others: Any = threading.excepthook) -> None:
    """What Python does for a thread that fails: nothing for TensorBoard's, whose error the next call to it raises."""
    if not type(failed.thread).__module__.startswith("tensorboard."):
        others(failed)
