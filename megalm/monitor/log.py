"""Where log lines go: rank 0 speaks on the terminal, every rank writes a file into logs/ of the run folder."""

import logging
import sys
from pathlib import Path

_FORMAT = "%(asctime)s rank {rank} %(levelname)s %(message)s"


def log_file(rank: int) -> str:
    """The name of a rank's log in the folder logs/ of a run."""
    return f"rank_{rank:05d}.log"


def start_logging(rank: int, folder: Path | None) -> logging.Logger:
    """The logger "megalm" of this rank; DeepSpeed's own lines go to the file only."""
    handlers: list[logging.Handler] = []
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(folder / log_file(rank)))
        handlers[0].setFormatter(logging.Formatter(_FORMAT.format(rank=rank)))
    deepspeed = logging.getLogger("DeepSpeed")
    deepspeed.handlers = list(handlers) or [logging.NullHandler()]
    deepspeed.propagate = False
    if rank == 0:
        terminal = logging.StreamHandler(sys.stdout)
        terminal.setFormatter(logging.Formatter("%(message)s"))
        handlers.append(terminal)
    logger = logging.getLogger("megalm")
    logger.handlers = handlers or [logging.NullHandler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return logger
