"""Where log lines go: rank 0 speaks on the terminal, every rank writes a file into logs/ of the run folder.

A log that cannot be written is no reason to end a run: it is said once, and the run goes on.
"""

import logging
import sys
from pathlib import Path
from typing import Any

from megalm.storage.faults import reason_of

_FORMAT = "%(asctime)s rank {rank} %(levelname)s %(message)s"


def log_file(rank: int) -> str:
    """The name of a rank's log in the folder logs/ of a run."""
    return f"rank_{rank:05d}.log"


def start_logging(rank: int, folder: Path | None) -> logging.Logger:
    """The logger "megalm" of this rank; DeepSpeed's own lines go to the file only."""
    handlers: list[logging.Handler] = []
    problem = ""
    if folder is not None:
        path = folder / log_file(rank)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handlers.append(_LogFile(path))
            handlers[0].setFormatter(logging.Formatter(_FORMAT.format(rank=rank)))
        except OSError as error:
            problem = f"{path} cannot be written, the run goes on without it: {reason_of(error, path)}"
    deepspeed = logging.getLogger("DeepSpeed")
    deepspeed.handlers = list(handlers) or [logging.NullHandler()]
    deepspeed.propagate = False
    if rank == 0:
        terminal = _Terminal(sys.stdout)
        terminal.setFormatter(logging.Formatter("%(message)s"))
        handlers.append(terminal)
    logger = logging.getLogger("megalm")
    logger.handlers = handlers or [logging.NullHandler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if problem:
        logger.warning(problem)
    return logger


class _LogFile(logging.FileHandler):
    """A log file; the first line that it cannot take is a warning on standard error, the others are silent."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Called where a line could not be written."""
        error = sys.exc_info()[1]
        if not self.failed and isinstance(error, OSError):
            self.failed = True
            print(
                f"warning: {self.baseFilename} cannot be written, the run goes on without it: "
                f"{reason_of(error, self.baseFilename)}",
                file=sys.stderr,
                flush=True,
            )
        elif not isinstance(error, OSError):
            super().handleError(record)


class _Terminal(logging.StreamHandler[Any]):
    """Standard output; where nobody reads it any more, lines are dropped."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Called where a line could not be written."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
