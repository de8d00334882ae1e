"""launch/pretrain_gpt.py that can be held: it waits at the step whose number is in RUN/hold, until that file is gone or
a signal has come.
"""

import time
from pathlib import Path
from typing import Any

from megalm import entry, training

_step_once = training.step_once


def held(run: training.Run, micro_batches: Any) -> None:
    """One step, as soon as it may be done."""
    assert run.config.checkpoint.save is not None
    hold = Path(run.config.checkpoint.save) / "hold"
    while not run.stop.number and holds(hold, run.progress.step):
        time.sleep(0.05)
    _step_once(run, micro_batches)


def holds(path: Path, step: int) -> bool:
    """Whether the file asks to wait at this step."""
    try:
        return step >= int(path.read_text())
    except (FileNotFoundError, ValueError):
        return False


if __name__ == "__main__":
    training.step_once = held
    entry.main()
