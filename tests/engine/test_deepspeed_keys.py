"""Every key that DeepSpeed gets: a run with it trains, saves, goes on, saves; one process without it has its loss."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalm.assembly import build_model_and_engine
from megalm.checkpoint.format import Manifest, find_checkpoint
from megalm.config.deepspeed.answers import HANDED
from megalm.config.merging.load import load_config
from megalm.config.sections import RunConfig
from megalm.continuation import ResumePoint, restore, save
from megalm.data.batch import Batch
from megalm.distributed.context import RankContext
from megalm.distributed.mesh import Mesh
from megalm.engine.engine import Engine
from megalm.errors import ConfigError
from megalm.run_state import Progress
from megalm.testing.batches import batch_of
from megalm.testing.spawner import run_on_ranks

VOCAB, SEQ, SAMPLES, STEPS = 31, 8, 8, 2
# vocabulary padding and odd sizes: some ranks hold padding alone, and ranges do not fall on borders of parameters
RECIPE = (
    f"--num-layers 2 --hidden-size 12 --num-attention-heads 2 --ffn-hidden-size 19 --vocab-size {VOCAB} "
    f"--make-vocab-size-divisible-by 64 --seq-length {SEQ} --max-position-embeddings {SEQ} --micro-batch-size 1 "
    f"--global-batch-size {SAMPLES} --train-iters 9 --lr 0.01 --weight-decay 0.1 --clip-grad 0.5 --mock-data "
    "--eval-iters 0 --kernels-backend reference"
).split()
CPU = torch.device("cpu")
QUICK = {
    "bf16.immediate_grad_update",
    *(f"zero_optimization.{key}" for key in (
        "round_robin_gradients", "contiguous_gradients", "sub_group_size",
    )),
}  # fmt: skip
"""Keys that change how weights or gradients are laid out."""


@dataclass(frozen=True)
class Row:
    """One value of one key in one layout; the key "": none."""

    key: str
    value: Any
    stage: int
    pipeline: bool = False

    @property
    def content(self) -> dict[str, Any]:
        """The JSON that says it."""
        content: Any = self.value
        for word in reversed(self.key.split(".") if self.key else []):
            content = {word: content}
        if "offload" in self.key and not self.key.endswith("device"):
            content["zero_optimization"][self.key.split(".")[1]]["device"] = "cpu"
        return content if self.key else {}

    @property
    def flags(self) -> list[str]:
        """What the run needs besides."""
        precision = [f"--{self.key[:4]}"] if self.key[:4] in ("bf16", "fp16") else []
        ranks = ["--pipeline-model-parallel-size", "2"] if self.pipeline else []
        return ["--zero-stage", str(self.stage), *precision, *ranks]

    @property
    def is_low(self) -> bool:
        """Whether the run computes or communicates in 16 bits."""
        return self.key[:4] in ("bf16", "fp16") or self.key == "communication_data_type"


def rows(stage: int, *, pipeline: bool) -> Iterator[Row]:
    """All keys in one layout; first none, to compare with."""
    yield Row("", {}, stage, pipeline)
    for key, handed in HANDED.items():
        for value in handed.tried:
            if stage in handed.stages or any(rule.concerns(value, stage, pipeline) for rule in handed.refusals):
                yield Row(key, value, stage, pipeline)


def quick() -> list[Row]:
    """A key that moves weights, without a pipeline, at the stages that divide gradients and weights."""
    return [row for stage in (2, 3) for row in rows(stage, pipeline=False) if row.key in QUICK or not row.key]


def loaded(row: Row, folder: Path) -> RunConfig | str:
    """The row's configuration, or why it is refused."""
    file = folder / "ds.json"
    file.write_text(json.dumps(row.content, indent=1))
    try:
        return load_config([*RECIPE, *row.flags, "--deepspeed_config", str(file), "--save", str(folder / "run")])
    except ConfigError as error:
        return str(error)


def sample(number: int) -> Batch:
    tokens = torch.randint(0, VOCAB, (1, SEQ + 1), generator=torch.Generator().manual_seed(number))
    return batch_of(tokens[:, :-1], tokens[:, 1:])


def own(engine: Engine, first: int) -> list[Batch]:
    """This rank's samples of a global batch."""
    data = engine.groups.data
    return [sample(number) for number in range(first + data.rank, first + SAMPLES, data.size)]


def started(config: RunConfig, origin: Path | None = None) -> Engine:
    where = RankContext.of(Mesh.of_config(config.parallel, dist.get_world_size()), CPU)
    engine = build_model_and_engine(config, config.model, where)
    if origin is not None:
        point = ResumePoint(origin, True, Manifest.read(origin).states)
        restore(engine, config, point)
    return engine


def evaluated(engine: Engine) -> float:
    return engine.mean_over_ranks(engine.eval_step(own(engine, 1000)))["lm"]


def trained(config: RunConfig) -> tuple[list[float], float]:
    """Train, save, go on from there, save again; the training losses and that of the last checkpoint."""
    losses, origin = [], None
    for first in (0, STEPS):
        engine = started(config, origin)
        steps = range(first, first + STEPS)
        losses += [engine.train_step(own(engine, step * SAMPLES), 0.01).loss for step in steps]
        origin = save(engine, config, {}, first + STEPS, [Progress(), engine.scalars], "", CPU)
    return losses, evaluated(engine)


def train_all(named: list[tuple[Row, RunConfig]]) -> list[tuple[list[float], float]]:
    results = []
    for row, config in named:
        try:
            results.append(trained(config))
        except Exception as error:
            raise AssertionError(f"{row}: {error!r}") from error
    return results


def evaluate_all(named: list[tuple[Row, Path]]) -> list[float]:
    found = []
    for row, origin in named:
        precision = [flag for flag in row.flags if flag in ("--bf16", "--fp16")]
        found.append(evaluated(started(load_config([*RECIPE, "--zero-stage", "0", *precision]), origin)))
    return found


def check(tried: list[Row], base: Path) -> None:
    named: list[tuple[Row, RunConfig]] = []
    for number, row in enumerate(tried):
        folder = base / str(number)
        folder.mkdir()
        config = loaded(row, folder)
        if isinstance(config, str):
            assert f"{folder / 'ds.json'}:" in config, row
            assert any(refusal.why in config for refusal in HANDED[row.key].refusals), row
        else:
            named.append((row, config))
    ranks = 4 if tried[0].pipeline else 2
    results = run_on_ranks(ranks, train_all, named, timeout_s=120 + 20 * len(named))[0]
    places = [(row, find_checkpoint(Path(str(config.checkpoint.save)))) for row, config in named]
    elsewhere = run_on_ranks(1, evaluate_all, places, timeout_s=120 + 10 * len(named))[0]
    plain: dict[int, list[float]] = {}
    for (row, _), (losses, here), there in zip(named, results, elsewhere, strict=True):
        assert there == pytest.approx(here, rel=2e-3 if row.is_low else 1e-5), row
        expected = plain.setdefault(row.stage, losses)
        assert losses == pytest.approx(expected, rel=3e-2 if row.is_low else 1e-4), row


def test_keys_that_change_the_layout_of_weights(tmp_path: Path) -> None:
    check(quick(), tmp_path)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("pipeline", [False, True], ids=["whole model", "pipeline"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_key_at_every_stage(tmp_path: Path, stage: int, pipeline: bool) -> None:
    check(list(rows(stage, pipeline=pipeline)), tmp_path)
