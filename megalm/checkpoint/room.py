"""Proof at the start that what the end needs is there: room for a shard under the process's limit, and on the disk."""

import logging
import shutil
from pathlib import Path

from megalm.errors import CheckpointError
from megalm.storage.faults import file_size_limit

log = logging.getLogger("megalm")


def check_room(run: Path, shard_bytes: int, checkpoint_bytes: int) -> None:
    """Returns where a file of `shard_bytes` may be written; says so where the disk lacks `checkpoint_bytes`.

    Raises:
        CheckpointError: the limit on the size of files (ulimit -f) is below.
    """
    limit = file_size_limit()
    if limit is not None and shard_bytes > limit:
        raise CheckpointError(
            f"--save {run}: a rank's shard of a checkpoint has {_mb(shard_bytes)}, and ulimit -f allows {_mb(limit)} a "
            "file; raise it where the run is started (ulimit -f unlimited), or train on more ranks"
        )
    free = shutil.disk_usage(run).free
    if free < checkpoint_bytes:
        log.warning(
            "--save %s: a checkpoint has about %s, and %s are free there; free some space before the first save",
            *(run, _mb(checkpoint_bytes), _mb(free)),
        )


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
