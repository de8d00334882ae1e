"""Proof at the start that what the end needs is there: room for a shard under the process's limit, and on the disk."""

import logging
import resource
import shutil
from pathlib import Path

from megalm.errors import CheckpointError

log = logging.getLogger("megalm")


def check_room(run: Path, shard_bytes: int, checkpoint_bytes: int) -> None:
    """Returns where a file of `shard_bytes` may be written; says so where the disk lacks `checkpoint_bytes`.

    Raises:
        CheckpointError: the limit on the size of files (ulimit -f) is below.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit not in (resource.RLIM_INFINITY, -1) and limit < shard_bytes:
        raise CheckpointError(
            f"a rank's part of a checkpoint in {run} has {_mb(shard_bytes)}, but no file of this process may exceed "
            f"{_mb(limit)} (ulimit -f); raise that limit in the shell or batch script that starts the run"
        )
    free = shutil.disk_usage(run).free
    if free < checkpoint_bytes:
        log.warning(
            "a checkpoint has about %s, and %s are free in %s: make room before the first save",
            _mb(checkpoint_bytes), _mb(free), run,
        )  # fmt: skip


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
