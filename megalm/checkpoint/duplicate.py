"""A checkpoint into another run folder, byte for byte, or not at all."""

import os
import shutil
from pathlib import Path

from megalm.checkpoint.format import LATEST, MANIFEST, Manifest, step_folder
from megalm.checkpoint.reader import problems_of
from megalm.checkpoint.writer import name_latest, new_folder
from megalm.errors import CheckpointError
from megalm.storage.durable import sync_file, sync_folder
from megalm.storage.faults import reading, writing


def copy_checkpoint(source: Path, run: Path) -> Path:
    """The checkpoint `source` in the run folder `run`, which is made where it is missing; its new place.

    What was copied is read again and compared with the manifest before it gets its name; `latest` names it where the
    run folder has no checkpoint yet.

    Raises:
        CheckpointError: `source` is damaged, `run` has a checkpoint of that step, or the system refuses.
    """
    manifest = Manifest.read(source)
    final, advice = step_folder(run, manifest.step), "mend the folder, free some space there, or choose another"
    if os.path.lexists(final):
        raise CheckpointError(f"{final} exists; choose another folder, or remove it first")
    with writing(run, CheckpointError, advice):
        run.mkdir(parents=True, exist_ok=True)
    partial = new_folder(run, final)
    try:
        for name in (*manifest.files, MANIFEST):
            with (
                reading(source / name, CheckpointError, "copy another step, or restore it from a copy"),
                writing(partial / name, CheckpointError, advice),
            ):
                shutil.copyfile(source / name, partial / name)
                sync_file(partial / name)
        if problems := problems_of(partial, manifest, verify=True):
            raise CheckpointError(
                f"{source} is not copied: {'; '.join(problems)}; copy another step (megalm checkpoint verify {source} "
                "says whether it is damaged)"
            )
        with writing(final, CheckpointError, advice):
            os.rename(partial, final)
            sync_folder(run)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if not (run / LATEST).exists():
        name_latest(run, manifest.step)
    return final
