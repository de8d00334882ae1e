"""How a run is saved and continued. A checkpoint is the engine's tensors and the states of all that is `Stateful`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalm.checkpoint.format import Manifest, find_checkpoint, steps_of
from megalm.checkpoint.hugging_face import HuggingFaceReader
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.restore import restore_slices, restore_weights
from megalm.checkpoint.resume import check_same_run, check_same_weights, states_of
from megalm.checkpoint.retention import Retention
from megalm.checkpoint.room import check_room
from megalm.checkpoint.verify import open_together
from megalm.checkpoint.writer import name_latest, prune_checkpoints, save_checkpoint
from megalm.config.hugging_face import same_model
from megalm.config.output import hugging_face_folder
from megalm.config.sections import RunConfig
from megalm.distillation import identity_of_teacher
from megalm.distributed.collectives import gather_json, on_all_ranks
from megalm.distributed.context import RankContext
from megalm.distributed.fingerprint import is_finite
from megalm.engine.batch_memory import BatchMemory
from megalm.engine.engine import Engine
from megalm.errors import CheckpointError
from megalm.run_state import Stateful

log = logging.getLogger("megalm")


@dataclass(frozen=True)
class ResumePoint:
    """Where a run begins: at a checkpoint, or at the first step."""

    origin: Path | None = None
    """The checkpoint, if any; with --finetune only its weights count, and a model of transformers has no more."""
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
        if origin is None or (hugging_face_folder(config.checkpoint.load) is not None and not same_run):
            return cls(origin, same_run)
        manifest, values = Manifest.read(origin), config.kept()
        if config.checkpoint.finetune and not same_run:
            for change in check_same_weights(manifest, values, identity):
                log.warning("the weights were trained otherwise: %s", change)
            return cls(origin, same_run)
        for change in check_same_run(manifest, values, identity):
            log.info("changed since step %d: %s", manifest.step, change)
        return cls(origin, same_run, states_of(manifest, values))

    def load(self, *states: Stateful) -> None:
        """Give each its state; one that the checkpoint does not know stays as it is.

        Raises:
            CheckpointError: what the checkpoint holds is no state of it.
        """
        for stateful in states:
            if stateful.name not in self.states:
                continue
            try:
                stateful.load(self.states[stateful.name])
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise CheckpointError(
                    f"{self.origin} is damaged (its state {stateful.name}: {error}); load another step"
                ) from error


def identity_of(config: RunConfig, tokenizer: str | None, context: RankContext) -> dict[str, Any]:
    """What a checkpoint remembers of the run's inputs, to refuse others on resume; every rank calls it.

    Raises:
        CheckpointError, ConfigError: the teacher is not there, or cannot teach the run's model.
    """
    identity: dict[str, Any] = {"tokenizer": tokenizer, **identity_of_teacher(config, tokenizer, context.device)}
    if config.data.sampling == "consecutive":  # it decides the order of the samples
        rows = config.batch.global_size(context.groups.data.size)
        identity["number of rows that read on (--global-batch-size)"] = str(rows)
    return identity


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
    if checkpoint.load is None or (
        checkpoint.save and Path(checkpoint.load).resolve() == Path(checkpoint.save).resolve()
    ):
        return None, False  # Megatron's scripts give one folder to both: it is gone on from once it holds a checkpoint
    if (folder := hugging_face_folder(checkpoint.load)) is not None:
        return folder, False
    found = find_checkpoint(Path(checkpoint.load), "load one of its step_N folders")
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
    remembered = 0 if engine.memory is None else engine.memory.written_elements
    own = 4 * (values // parts + remembered)  # fp32
    total = sum(gather_json(own, engine.device))
    on_all_ranks(engine.device, lambda: check_room(run, own, total))


def restore(engine: Engine, config: RunConfig, point: ResumePoint) -> None:
    """Put the checkpoint's weights into the engine, and its optimizer's state unless another is to begin.

    Every rank calls it.

    Raises:
        CheckpointError: the checkpoint is damaged, of another model or of another optimizer, or the model would not
            compute with what the optimizer got.
    """
    if point.origin is None:
        return
    reader: CheckpointReader | HuggingFaceReader
    if point.same_run or hugging_face_folder(config.checkpoint.load) is None:
        reader = open_together(point.origin, engine.shard_specs, engine.device)
    else:
        folder = point.origin
        reader = on_all_ranks(engine.device, lambda: _open_model_folder(config, folder), "opening the model folder")
    on_all_ranks(engine.device, lambda: _restore_from(reader, engine, config, point), "loading the checkpoint")
    check_restored(engine, point)


def _restore_from(
    reader: CheckpointReader | HuggingFaceReader, engine: Engine, config: RunConfig, point: ResumePoint
) -> None:
    same_run, weights_only = point.same_run, _weights_only(config) and not point.same_run
    # asked for, and not needlessly: the same run with its optimizer state always goes on exactly
    new_optimizer = config.checkpoint.no_load_optim and (not same_run or not reader.has_optimizer_state)
    with_moments = not weights_only and not new_optimizer
    parameters = {name: parameter for parameter, name in engine.names.items()}
    restore_weights(reader, parameters, engine.shard_specs, engine.set_weight)
    restore_slices(reader, engine.state_slices(), with_moments=with_moments)
    if with_moments:
        point.load(engine.scalars)
    if engine.memory is not None and not weights_only:
        _restore_memory(reader, engine.memory, point)


def _restore_memory(reader: CheckpointReader | HuggingFaceReader, memory: BatchMemory, point: ResumePoint) -> None:
    assert isinstance(reader, CheckpointReader), "a model of transformers gives weights only"
    try:
        memory.load(reader.memory, reader.read)
    except ValueError as error:
        raise CheckpointError(f"{point.origin} is damaged ({error}); load another step") from error


def _weights_only(config: RunConfig) -> bool:
    """Whether --load gives weights and nothing else."""
    return config.checkpoint.finetune or hugging_face_folder(config.checkpoint.load) is not None


def _open_model_folder(config: RunConfig, origin: Path) -> HuggingFaceReader:
    """A model of transformers.

    Raises:
        CheckpointError: it is damaged, or another than the run's settings say.
    """
    reader = HuggingFaceReader(origin)
    if differences := same_model(config.model, reader.model_config):
        raise CheckpointError(
            f"the model of {origin} is another than the run's: {', '.join(differences)} here; leave these settings to "
            "its config.json"
        )
    return reader


def check_restored(engine: Engine, point: ResumePoint) -> None:
    """Compare what `restore` put into the model with what it put into the optimizer; every rank calls it.

    Raises:
        CheckpointError: they differ, or the weights are not finite.
    """
    if point.origin is None:
        return
    wrong = engine.differing_from_state()
    infinite = [piece.name for piece in engine.state_slices() if not is_finite(piece.weight)]
    on_all_ranks(engine.device, lambda: _refuse_restored(point.origin, wrong, infinite))


def _refuse_restored(origin: Path | None, wrong: Sequence[str], infinite: Sequence[str]) -> None:
    if infinite:
        raise CheckpointError(
            f"{origin} holds weights that are not finite ({infinite[0]}); load another step, written before it"
        )
    if wrong:
        raise CheckpointError(
            f"{origin} is not restored: the model would compute with other weights than are trained (of {wrong[0]}); "
            "this is a fault of megalm or of an option of DeepSpeed: take options out of the DeepSpeed JSON, or use "
            "another --zero-stage"
        )


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

    Earlier ones stay; `prune` removes them, when the step after this one has shown that it is good.

    Raises:
        CheckpointError: it could not be written, or would not be what the model computes with.
        NonFiniteError: weights or optimizer state are not finite.
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
        [*engine.owned_slices(), *([] if engine.memory is None else engine.memory.slices())],
        header=header,
        with_moments=not config.checkpoint.no_save_optim,
        differing=engine.differing_from_written,
        dtype=engine.dtype,
        device=device,
    )


def prune(config: RunConfig, saved: int, device: torch.device) -> None:
    """Remove the checkpoints up to step `saved` that the run's rules do not want; every rank calls it."""
    folder, rules = config.checkpoint.save, retention_of(config)
    if folder is not None and rules.asks:
        on_all_ranks(device, lambda: prune_checkpoints(Path(folder), saved, rules) if dist.get_rank() == 0 else None)


def retention_of(config: RunConfig) -> Retention:
    """Which checkpoints of a run stay."""
    checkpoint = config.checkpoint
    return Retention(
        last=checkpoint.keep_checkpoints, every=checkpoint.save_retain_interval, best=checkpoint.keep_best_checkpoints
    )


def turn_back(config: RunConfig, saved: int, device: torch.device) -> int | None:
    """Let the run go on from the checkpoint before that of step `saved`, which stays; its step, None if there is none.

    Every rank calls it.
    """
    assert config.checkpoint.save is not None, "only a run with a folder has checkpoints"
    run = Path(config.checkpoint.save)
    before = [step for step in steps_of(run) if step < saved]
    if before:
        on_all_ranks(device, lambda: name_latest(run, before[-1]) if dist.get_rank() == 0 else None)
    return before[-1] if before else None
