"""A launcher that is killed leaves its ranks behind; they notice, save and end.

torchrun, mpirun and srun's own daemon are the parent of each rank. The deepspeed command starts its ranks through a
process between, which does not notice either: a signal to the command alone would leave all of them.
"""

import os
import signal
import threading
import time
from pathlib import Path

import psutil

_LOOK_S = 1.0


GRACE_S = {"deepspeed": 30, "torchrun": 30, "srun": 30}
"""How long a launcher lets a rank live that it has asked to end."""


def grace_note(launcher: str, folder: str | None) -> str:
    """What a user should know who stops a run through its launcher; "" where there is time, or nothing to save."""
    if launcher not in GRACE_S or folder is None:
        return ""
    longer = {"torchrun": " (torchrun --shutdown-timeout S)", "srun": " (KillWait of slurm.conf)"}.get(launcher, "")
    return (
        f"stopped through {launcher}, ranks are killed {GRACE_S[launcher]} s later{longer}: a step and a save must fit "
        "in; a signal to the ranks themselves (SIGUSR1) leaves them all the time"
    )


def watch_launcher(launcher: str) -> None:
    """Send this process SIGTERM, which asks it to stop, once the launcher that started it is gone."""
    ancestors = _ancestors(launcher)
    if ancestors:
        threading.Thread(target=_watch, args=(ancestors,), name="watch-launcher", daemon=True).start()


def _ancestors(launcher: str) -> list[int]:
    """The processes, from the parent upwards, without which nobody looks after this one; [] if nobody did before."""
    if launcher == "none":
        return []
    parent = os.getppid()
    if launcher != "deepspeed":
        return [parent]
    # who sets RANK by hand may start ranks from a shell that does not wait for them
    try:
        process = psutil.Process(parent)
        if "deepspeed.launcher.launch" not in process.cmdline():
            return []
        above = process.parent()
        is_command = above is not None and "deepspeed" in [Path(word).name for word in above.cmdline()[:2]]
    except psutil.Error:
        return []
    return [parent, above.pid] if above is not None and is_command else [parent]


def _watch(ancestors: list[int]) -> None:
    while _lives(ancestors):
        time.sleep(_LOOK_S)
    os.kill(os.getpid(), signal.SIGTERM)


def _lives(ancestors: list[int]) -> bool:
    """Whether each is still the parent of the one below; a process that is gone is not, whoever uses its number."""
    if os.getppid() != ancestors[0]:
        return False
    try:
        return len(ancestors) == 1 or psutil.Process(ancestors[0]).ppid() == ancestors[1]
    except psutil.Error:
        return False
