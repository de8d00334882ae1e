"""Where a run stands, and how it is saved and continued: the engine's state to and from a checkpoint."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint.format import Manifest, find_checkpoint
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.restore import restore_slices, restore_weights
from megalm.checkpoint.resume import check_same_run
from megalm.checkpoint.writer import save_checkpoint
from megalm.config import RunConfig
from megalm.data.samples.blended_dataset import OrderRecord
from megalm.engine.engine import Engine
from megalm.errors import CheckpointError

log = logging.getLogger("megalm")


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    consumed_samples: int = 0
    """Training samples used: the number of the next sample."""
    skipped_iterations: int = 0
    """Steps whose gradients were not finite."""
    nan_iterations: int = 0
    """Steps whose loss was not finite."""
    bad_in_a_row: int = 0
    """Skipped steps since the last good one."""

    def count(self, loss: float, skipped: bool, samples: int) -> None:
        """One more step; a skipped one uses up its samples and its place in the schedule like any other."""
        self.step += 1
        self.consumed_samples += samples
        self.skipped_iterations += skipped
        self.nan_iterations += not math.isfinite(loss)
        self.bad_in_a_row = self.bad_in_a_row + 1 if skipped else 0


@dataclass(frozen=True)
class ResumePoint:
    """Where a run begins: at a checkpoint, or at the first step."""

    origin: Path | None = None
    """The checkpoint, if any; with --finetune only its weights count."""
    same_run: bool = False
    """The checkpoint is this very run's, of --save."""
    step: int = 0
    consumed_samples: int = 0
    order: OrderRecord | None = None
    """How the training samples were drawn up to here."""

    @classmethod
    def of(cls, config: RunConfig, identity: dict[str, Any]) -> "ResumePoint":
        """Where the run of `config` begins.

        Raises:
            CheckpointError: as `start_place`; a damaged manifest, or one of another model or run.
        """
        origin, same_run = start_place(config)
        if origin is None or (config.checkpoint.finetune and not same_run):
            return cls(origin, same_run)
        manifest = Manifest.read(origin)
        for change in check_same_run(manifest, config.model_dump(mode="json"), identity):
            log.info("changed since step %d: %s", manifest.step, change)
        order = manifest.scalars.get("order")
        return cls(
            origin,
            same_run,
            manifest.step,
            manifest.consumed_samples,
            None if order is None else OrderRecord.from_json(order),
        )


def start_place(config: RunConfig) -> tuple[Path | None, bool]:
    """The checkpoint to start from, and whether it is this very run's.

    `--save` comes first, so that the same command continues; `--load` counts until --save has a checkpoint.

    Raises:
        CheckpointError: --load has no checkpoint, or --save holds some that `latest` does not name.
    """
    checkpoint = config.checkpoint
    if checkpoint.save and not checkpoint.fresh:
        found = find_checkpoint(Path(checkpoint.save))
        if found is not None:
            return found, True
    if checkpoint.load is None:
        return None, False
    found = find_checkpoint(Path(checkpoint.load))
    if found is None:
        raise CheckpointError(
            f"--load {checkpoint.load} holds no checkpoint (a run folder with `latest`, or a step_N folder); "
            "correct the path, or drop --load to start from scratch"
        )
    return found, False


def restore(engine: Engine, config: RunConfig, point: ResumePoint) -> Progress:
    """Put the checkpoint's state into the engine; the progress from which to go on.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model.
    """
    if point.origin is None:
        return Progress()
    reader, same_run = CheckpointReader(point.origin), point.same_run
    weights_only = config.checkpoint.finetune and not same_run
    # asked for, and not needlessly: the same run with its optimizer state always goes on exactly
    new_optimizer = config.checkpoint.no_load_optim and (not same_run or not reader.has_optimizer_state)
    with_moments = not weights_only and not new_optimizer
    parameters = {name: parameter for parameter, name in engine.names.items()}
    restore_weights(reader, parameters, engine.shard_specs, engine.set_weight)
    restore_slices(reader, engine.state_slices(), with_moments=with_moments)
    if with_moments:
        engine.load_scalar_state(reader.manifest.scalars["optimizer"])
    if weights_only:
        return Progress()
    counters = reader.manifest.scalars["progress"]
    return Progress(step=reader.manifest.step, consumed_samples=reader.manifest.consumed_samples, **counters)


def save(
    engine: Engine,
    config: RunConfig,
    identity: dict[str, Any],
    progress: Progress,
    order: dict[str, Any] | None,
    layout: str,
    device: torch.device,
) -> Path:
    """Write the checkpoint of `progress` into the run folder; `order` is what the data says of its samples.

    Raises:
        CheckpointError: it could not be written; the earlier ones are untouched.
    """
    assert config.checkpoint.save is not None, "only a run with a folder saves"
    with_moments = not config.checkpoint.no_save_optim
    slices = engine.owned_slices()
    header = {
        "step": progress.step,
        "consumed_samples": progress.consumed_samples,
        "layout": f"{layout}, ZeRO {engine.stage}",
        "config": config.model_dump(mode="json"),
        "identity": identity,
        "scalars": {
            "optimizer": engine.scalar_state(),
            "progress": {
                "skipped_iterations": progress.skipped_iterations,
                "nan_iterations": progress.nan_iterations,
                "bad_in_a_row": progress.bad_in_a_row,
            },
            "order": order,
        },
    }
    return save_checkpoint(
        Path(config.checkpoint.save),
        slices,
        header=header,
        with_moments=with_moments,
        keep=config.checkpoint.keep_checkpoints,
        device=device,
    )
