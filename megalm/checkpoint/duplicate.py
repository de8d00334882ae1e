"""A checkpoint into another run folder, byte for byte, or not at all."""

import os
import shutil
from pathlib import Path

from megalm.checkpoint.format import LATEST, MANIFEST, Manifest, step_folder
from megalm.checkpoint.reader import problems_of
from megalm.checkpoint.run_folder import lock_run_folder
from megalm.checkpoint.writer import name_latest, new_folder
from megalm.errors import CheckpointError
from megalm.storage.durable import open_new, sync_file, sync_folder
from megalm.storage.faults import reading, writing

_PIECE = 1 << 24
_ADVICE = "mend the folder, free some space there, or choose another"


def copy_checkpoint(source: Path, run: Path) -> Path:
    """The checkpoint `source` in the run folder `run`, which is made where it is missing; its new place.

    What was copied is read again and compared with the manifest before it gets its name; `latest` names it where the
    run folder has no checkpoint yet.

    Raises:
        CheckpointError: `source` is damaged, `run` has a checkpoint of that step or is in use, or the system refuses.
    """
    manifest = Manifest.read(source)
    final = step_folder(run, manifest.step)
    if os.path.lexists(final):
        raise CheckpointError(f"{final} exists; choose another folder, or remove it first")
    with writing(run, CheckpointError, _ADVICE):
        run.mkdir(parents=True, exist_ok=True)
    with lock_run_folder(run):  # a run that saves there would lose what it has written so far
        _copy(source, manifest, final)
        if not (run / LATEST).exists():
            name_latest(run, manifest.step)
    return final


def _copy(source: Path, manifest: Manifest, final: Path) -> None:
    partial = new_folder(final.parent, final)
    try:
        for name in (*manifest.files, MANIFEST):
            with reading(source / name, CheckpointError, "give this process the right to read it"):
                held = open(source / name, "rb")  # noqa: SIM115
            with held, writing(partial / name, CheckpointError, _ADVICE), open_new(partial / name) as copied:
                shutil.copyfileobj(held, copied, _PIECE)
            sync_file(partial / name)
        if problems := problems_of(partial, manifest, verify=True):
            raise CheckpointError(
                f"{source} is not copied: {'; '.join(problems)}; copy another step (megalm checkpoint verify {source} "
                "says whether it is damaged)"
            )
        with writing(final, CheckpointError, _ADVICE):
            os.rename(partial, final)
            sync_folder(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
