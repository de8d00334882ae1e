"""How a run is saved and continued. A checkpoint is the engine's tensors and the states of all that is `Stateful`."""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from megalm.checkpoint.format import Manifest, find_checkpoint
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.restore import restore_slices, restore_weights
from megalm.checkpoint.resume import check_same_run
from megalm.checkpoint.room import check_room
from megalm.checkpoint.verify import open_together
from megalm.checkpoint.writer import save_checkpoint
from megalm.config import RunConfig
from megalm.data.samples.blended_dataset import BlendedDataset, OrderRecord
from megalm.data.samples.sample import SampleDataset
from megalm.distributed.collectives import gather_json, on_all_ranks
from megalm.engine.engine import Engine
from megalm.errors import CheckpointError

log = logging.getLogger("megalm")


class Stateful(Protocol):
    """What has state, besides tensors, that outlives a step: who is one is saved and continued with the run."""

    @property
    def name(self) -> str:
        """Under which the checkpoint keeps its state."""

    def state(self) -> dict[str, Any]:
        """What JSON can hold of it."""

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""


@dataclass
class Progress:
    """How far a run is."""

    name: ClassVar[str] = "progress"
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

    def state(self) -> dict[str, Any]:
        """All counters."""
        return asdict(self)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        for counter, value in state.items():
            setattr(self, counter, value)


@dataclass
class SampleOrder:
    """How the training samples are drawn. What was saved of it decides how the data is laid out, and so comes first."""

    name: ClassVar[str] = "order"
    progress: Progress
    record: OrderRecord | None = None
    """How the samples were drawn up to the checkpoint."""
    dataset: SampleDataset | None = None
    """The samples, laid out accordingly."""

    def state(self) -> dict[str, Any]:
        """The record of the samples that are used; empty where their number says all."""
        if not isinstance(self.dataset, BlendedDataset):
            return {}
        return asdict(self.dataset.record(self.progress.consumed_samples))

    def load(self, state: dict[str, Any]) -> None:
        """The record that the dataset is to be built by."""
        self.record = OrderRecord.from_json(state) if state else None


@dataclass(frozen=True)
class ResumePoint:
    """Where a run begins: at a checkpoint, or at the first step."""

    origin: Path | None = None
    """The checkpoint, if any; with --finetune only its weights count."""
    same_run: bool = False
    """The checkpoint is this very run's, of --save."""
    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The checkpoint's, by name; none where the run starts its own."""

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
        for change in check_same_run(manifest, config.kept(), identity):
            log.info("changed since step %d: %s", manifest.step, change)
        return cls(origin, same_run, manifest.states)

    def load(self, *states: Stateful) -> None:
        """Give each its state; one that the checkpoint does not know stays as it is."""
        for stateful in states:
            if stateful.name in self.states:
                stateful.load(self.states[stateful.name])


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


def prove_room(engine: Engine, config: RunConfig) -> None:
    """Find out before training whether a checkpoint can be written; every rank calls it.

    Raises:
        CheckpointError: it cannot.
    """
    if config.checkpoint.save is None:
        return
    run, parts = Path(config.checkpoint.save), engine.groups.weights.size
    kept = 0 if config.checkpoint.no_save_optim else 1
    values = sum(
        spec.box.numel * (1 + kept * len(engine.state_kinds(name, spec.shape)))
        for name, spec in engine.shard_specs.items()
        if spec.is_owner
    )
    own = 4 * values // parts  # fp32
    total = sum(gather_json(own, engine.device))
    on_all_ranks(engine.device, lambda: check_room(run, own, total))


def restore(engine: Engine, config: RunConfig, point: ResumePoint) -> None:
    """Put the checkpoint's weights into the engine, and its optimizer's state unless another is to begin.

    Every rank calls it.

    Raises:
        CheckpointError: the checkpoint is damaged, of another model or of another optimizer.
    """
    if point.origin is None:
        return
    reader = open_together(point.origin, engine.shard_specs, engine.device)
    on_all_ranks(engine.device, lambda: _restore_from(reader, engine, config, point), "loading the checkpoint")


def _restore_from(reader: CheckpointReader, engine: Engine, config: RunConfig, point: ResumePoint) -> None:
    same_run = point.same_run
    weights_only = config.checkpoint.finetune and not same_run
    # asked for, and not needlessly: the same run with its optimizer state always goes on exactly
    new_optimizer = config.checkpoint.no_load_optim and (not same_run or not reader.has_optimizer_state)
    with_moments = not weights_only and not new_optimizer
    parameters = {name: parameter for parameter, name in engine.names.items()}
    restore_weights(reader, parameters, engine.shard_specs, engine.set_weight)
    restore_slices(reader, engine.state_slices(), with_moments=with_moments)
    if with_moments:
        point.load(engine.scalars)


def save(
    engine: Engine,
    config: RunConfig,
    identity: dict[str, Any],
    step: int,
    states: Sequence[Stateful],
    layout: str,
    device: torch.device,
) -> Path:
    """Write the checkpoint of `step` into the run folder: the engine's tensors and `states`.

    Raises:
        CheckpointError: it could not be written; the earlier ones are untouched.
    """
    assert config.checkpoint.save is not None, "only a run with a folder saves"
    header = {
        "step": step,
        "layout": f"{layout}, ZeRO {engine.zero_stage}",
        "config": config.kept(),
        "identity": identity,
        "states": {stateful.name: stateful.state() for stateful in states},
    }
    return save_checkpoint(
        Path(config.checkpoint.save),
        engine.owned_slices(),
        header=header,
        with_moments=not config.checkpoint.no_save_optim,
        keep=config.checkpoint.keep_checkpoints,
        device=device,
    )
