"""What training steps really get, over stops with another layout, batch, blend or length: each token once an epoch."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megalm.config.merging.load import load_config
from megalm.data.indexed.writer import IndexedDatasetBuilder
from megalm.distributed.context import RankContext
from megalm.distributed.mesh import Axis, Mesh
from megalm.engine.engine import Engine
from megalm.testing.spawner import run_on_ranks
from megalm.training import pretrain

SEQ, TOKENS = 16, 455
NAMES = ("first", "second", "third")
PER_EPOCH = (TOKENS - 1) // SEQ
MODEL = (
    f"--num-layers 2 --hidden-size 16 --num-attention-heads 2 --vocab-size {TOKENS * len(NAMES)} --seq-length {SEQ} "
    f"--max-position-embeddings {SEQ} --micro-batch-size 2 --lr 0.001 --eval-iters 0 --num-workers 0 --split 100,0,0"
)
Samples = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three datasets whose tokens are all different, so that each token tells where it stands."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(3)
    for number, name in enumerate(NAMES):
        edges = np.sort(random.choice(np.arange(1, TOKENS), 20, replace=False))
        with IndexedDatasetBuilder(folder / name, "uint16") as builder:
            lengths = np.diff(edges, prepend=0, append=TOKENS).astype(np.int32)
            builder.add_documents(np.arange(number * TOKENS, (number + 1) * TOKENS), lengths)
            builder.finalize()
    return folder


def steps_of_a_rank(flags: list[str]) -> tuple[dict[Axis, int], list[list[Samples]]]:
    """Train; the rank's place on the mesh, and for each step the inputs of each sample of each micro-batch."""
    config = load_config(flags)
    context = RankContext.of(Mesh.of_config(config.parallel, dist.get_world_size()), torch.device("cpu"))
    steps: list[list[Samples]] = []
    original = Engine.train_step

    def recorded(engine: Engine, batches: Any, *rest: Any, **options: Any) -> Any:
        steps.append([[tuple(row) for row in batch["tokens"].tolist()] for batch in batches])
        return original(engine, batches, *rest, **options)

    Engine.train_step = recorded  # type: ignore[method-assign]
    assert pretrain(config, context) == 0
    return context.mesh.coordinate(context.rank), steps


def consumed(ranks: int, *flags: str) -> Samples:
    """The samples that a run's ranks train on, in the order of their numbers."""
    words = [word for flag in (MODEL, *flags) for word in flag.split()]
    by_rank: dict[int, list[list[Samples]]] = {}
    for coordinate, steps in run_on_ranks(ranks, steps_of_a_rank, words):
        seen = by_rank.setdefault(coordinate[Axis.DP], steps)
        assert seen == steps, "ranks that share a model get the same samples"
    first = by_rank[0]
    return [
        sample
        for step in range(len(first))
        for micro in range(len(first[step]))
        for rank in sorted(by_rank)
        for sample in by_rank[rank][step][micro]
    ]


def by_dataset(samples: Samples) -> list[Samples]:
    return [[sample for sample in samples if sample[0] // TOKENS == number] for number in range(len(NAMES))]


def blend(folder: Path, *weights: int) -> str:
    return "--data-path " + " ".join(f"{weight} {folder / name}" for weight, name in zip(weights, NAMES, strict=True))


TP = "--tensor-model-parallel-size 2"
PP = "--pipeline-model-parallel-size 2"


@pytest.mark.parametrize("sampling", ["shuffle", pytest.param("stream", marks=pytest.mark.long)])
def test_no_layout_batch_or_blend_repeats_or_loses_a_sample(folder: Path, tmp_path: Path, sampling: str) -> None:
    """1 -> 2 (tensor) -> 2 (pipeline) -> 2 (data) -> 1 ranks; each time another batch size or blend."""
    run = f"--sampling {sampling} --save {tmp_path} --train-samples"
    seen = consumed(1, f"{run} 48 --exit-interval 2 --global-batch-size 8", blend(folder, 2, 1, 1))
    assert [len(samples) for samples in by_dataset(seen)] == [8, 4, 4]
    seen += consumed(2, f"{run} 48 --exit-interval 4 --global-batch-size 4", blend(folder, 2, 1, 1), TP)
    assert [len(samples) for samples in by_dataset(seen)] == [12, 6, 6]
    whole = consumed(1, f"--sampling {sampling} --train-samples 48 --global-batch-size 24", blend(folder, 2, 1, 1))
    assert seen == whole[: len(seen)], "ranks and batch size do not count"
    seen += consumed(2, f"{run} 48 --exit-interval 5 --global-batch-size 8", blend(folder, 1, 1, 2), PP)
    assert [len(samples) for samples in by_dataset(seen)] == [14, 8, 10]
    # on beyond the epochs that the run began with, to two epochs of each dataset
    left = [2 * PER_EPOCH - count for count in (14, 8, 10)]
    assert sum(left) == 136
    seen += consumed(2, f"{run} 72 --exit-interval 8 --global-batch-size 8", blend(folder, *left))
    seen += consumed(1, f"{run} 168 --global-batch-size 4", blend(folder, *left))
    for samples in by_dataset(seen):
        assert len(samples) == 2 * PER_EPOCH
        for epoch in (samples[:PER_EPOCH], samples[PER_EPOCH:]):
            tokens = Counter(token for sample in epoch for token in sample)
            assert set(tokens.values()) == {1}, "each token once"
            assert len(tokens) == PER_EPOCH * SEQ, "but for the last that fill no sample"


def test_a_longer_run_repeats_no_sample_of_an_epoch(folder: Path, tmp_path: Path) -> None:
    """From the middle of an epoch over its end, twice."""
    seen: Samples = []
    run = f"--data-path {folder / NAMES[0]} --save {tmp_path} --global-batch-size 4 --train-iters"
    for iterations in (3, 10, 21):
        seen += consumed(1, f"{run} {iterations}")
    assert len(seen) == 3 * PER_EPOCH
    for first in range(0, len(seen), PER_EPOCH):
        assert len({token for sample in seen[first : first + PER_EPOCH] for token in sample}) == PER_EPOCH * SEQ
