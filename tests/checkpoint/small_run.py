"""A model small enough to train, save and restore many times in one test; functions for the ranks of `run_on_ranks`."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from megalm.assembly import build_model_and_engine
from megalm.checkpoint.format import Manifest
from megalm.config.merging.load import load_config
from megalm.config.sections import RunConfig
from megalm.continuation import ResumePoint, check_restored, restore, save
from megalm.data.batch import Batch
from megalm.distributed.context import RankContext
from megalm.distributed.mesh import Mesh
from megalm.engine.engine import Engine
from megalm.randomness import stable_seed
from megalm.run_state import Progress
from megalm.testing.batches import batch_of

SAMPLES, SEQ, VOCAB, LR = 6, 8, 31, 0.01
# odd sizes, so that ranges do not fall on the borders of parameters; dropout, so that a wrong seed shows
RECIPE = (
    f"--num-layers 1 --hidden-size 12 --num-attention-heads 2 --ffn-hidden-size 19 --vocab-size {VOCAB} "
    f"--make-vocab-size-divisible-by 1 --seq-length {SEQ} --max-position-embeddings {SEQ} --micro-batch-size 1 "
    f"--global-batch-size {SAMPLES} --hidden-dropout 0.1 --attention-dropout 0.1 --train-iters 9 --lr {LR} "
    "--weight-decay 0.1 --clip-grad 0.5 --mock-data --eval-iters 0"
)
CPU = torch.device("cpu")
LINEAR = torch.nn.functional.linear
IDENTITY = {"tokenizer": "0123456789abcdef"}


@dataclass
class SmallRun:
    """An engine, how far it is, and what its steps gave."""

    config: RunConfig
    engine: Engine
    progress: Progress = field(default_factory=Progress)
    steps: list[tuple[float, float, float]] = field(default_factory=list)
    """Loss, gradient norm and loss scale of each step."""

    def step(self, count: int) -> None:
        """Train on the next samples, each the same whoever takes it."""
        data = self.engine.groups.data
        for _ in range(count):
            first = self.progress.consumed_samples + data.rank
            numbers = range(first, self.progress.consumed_samples + SAMPLES, data.size)
            result = self.engine.train_step([sample(number) for number in numbers], LR)
            self.steps.append((result.loss, result.grad_norm, result.loss_scale))
            self.progress.step += 1
            self.progress.consumed_samples += SAMPLES

    def save(self) -> Path:
        """Write the checkpoint of the step reached."""
        layout = str(self.engine.groups.mesh)
        states = [self.progress, self.engine.scalars]
        return save(self.engine, self.config, IDENTITY, self.progress.step, states, layout, CPU)


def sample(number: int) -> Batch:
    tokens = torch.randint(0, VOCAB, (1, SEQ + 1), generator=torch.Generator().manual_seed(number))
    return batch_of(tokens[:, :-1], tokens[:, 1:], seed=stable_seed(1, "dropout", number))


def start(folder: str, flags: str = "", origin: Path | None = None) -> SmallRun:
    """A run from scratch, or from the checkpoint at `origin`."""
    torch.nn.functional.linear = LINEAR  # ZeRO 3 of an earlier run in this process has put its own there, for good
    config = load_config([*RECIPE.split(), "--save", folder, *flags.split()])
    where = RankContext.of(Mesh.of_config(config.parallel, dist.get_world_size()), CPU)
    run = SmallRun(config, build_model_and_engine(config, config.model, where))
    point = point_of(origin)
    point.load(run.progress)
    restore(run.engine, config, point)
    check_restored(run.engine, point)
    return run


def point_of(origin: Path | None) -> ResumePoint:
    """Where a run goes on that finds its own checkpoint at `origin`."""
    if origin is None:
        return ResumePoint()
    return ResumePoint(origin, True, Manifest.read(origin).states)
