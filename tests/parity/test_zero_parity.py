"""Every ZeRO stage on two ranks trains like one process: losses, gradient norms and weights of five steps."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from spawner import run_on_ranks

from megalm.assembly import Place, build_model_and_engine
from megalm.config import load_config
from megalm.dist.mesh import Mesh

STEPS = 5
SAMPLES, SEQ, VOCAB = 8, 16, 61
RECIPE = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --ffn-hidden-size 64 --swiglu "
    f"--position-embedding-type rope --normalization RMSNorm --vocab-size {VOCAB} --make-vocab-size-divisible-by 8 "
    f"--max-position-embeddings {SEQ} --seq-length {SEQ} --global-batch-size {SAMPLES} --train-iters {STEPS} "
    "--lr 0.01 --weight-decay 0.1 --clip-grad 0.5 --mock-data --eval-iters 0"
)


@dataclass
class Trained:
    """What a run did."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]


def trained(extra: str) -> Trained | None:
    """Train on seeded random tokens with a ragged loss mask; rank 0's record (whole weights)."""
    config = load_config([*RECIPE.split(), *extra.split()])
    rank, world = dist.get_rank(), dist.get_world_size()
    place = Place.of(Mesh.of(world), torch.device("cpu"))
    engine = build_model_and_engine(config, config.model, place)
    micro, accumulation = config.batch.micro_batch_size, config.batch.accumulation(world)
    generator = torch.Generator().manual_seed(7)
    losses, norms = [], []
    for _ in range(STEPS):
        tokens = torch.randint(0, VOCAB, (SAMPLES, SEQ + 1), generator=generator)
        # samples keep very different numbers of tokens, so that a mean of means would be wrong
        mask = (torch.rand(SAMPLES, SEQ, generator=generator) > torch.rand(SAMPLES, 1, generator=generator)).float()
        parts = []
        for number in range(accumulation):
            rows = slice((number * world + rank) * micro, (number * world + rank + 1) * micro)
            parts.append({"tokens": tokens[rows, :-1], "labels": tokens[rows, 1:], "loss_mask": mask[rows]})
        result = engine.train_step(parts, [0] * accumulation, 0.01)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    return Trained(losses, norms, whole_weights(engine))


def whole_weights(engine) -> dict[str, torch.Tensor]:
    """Every fp32 weight, put together from the ranks' slices."""
    whole = {name: torch.zeros(shape).view(-1) for name, shape in engine.shapes.items()}
    for piece in engine.owned_slices():
        whole[piece.name][piece.start : piece.stop] = piece.weight
    for tensor in whole.values():
        dist.all_reduce(tensor)
    return whole


@pytest.fixture(scope="module")
def one_process() -> Trained:
    return run_on_ranks(1, trained, "--zero-stage 0 --micro-batch-size 8")[0]


FP32 = (1e-5, 1e-5)
# low precision rounds activations and weights at every step; Adam turns a tiny gradient's sign into a whole step
BF16 = (1e-2, 6e-2)
FP16 = (5e-3, 5e-3)
ROWS = [
    # ranks, flags, relative tolerance: of losses and norms, of all weights together (L2)
    (1, "--zero-stage 0 --micro-batch-size 2", *FP32),
    (2, "--zero-stage 0 --micro-batch-size 2", *FP32),
    (2, "--zero-stage 1 --micro-batch-size 2", *FP32),
    (2, "--zero-stage 2 --micro-batch-size 2", *FP32),
    (2, "--zero-stage 3 --micro-batch-size 2", *FP32),
    (2, "--zero-stage 2 --micro-batch-size 4", *FP32),
    (2, "--zero-stage 3 --micro-batch-size 1", *FP32),
    (2, "--zero-stage 0 --micro-batch-size 2 --bf16", *BF16),
    (2, "--zero-stage 1 --micro-batch-size 2 --bf16", *BF16),
    (2, "--zero-stage 2 --micro-batch-size 2 --bf16", *BF16),
    (2, "--zero-stage 3 --micro-batch-size 2 --bf16", *BF16),
    (2, "--zero-stage 0 --micro-batch-size 2 --fp16 --initial-loss-scale 1024", *FP16),
    (2, "--zero-stage 1 --micro-batch-size 2 --fp16 --initial-loss-scale 1024", *FP16),
    (2, "--zero-stage 2 --micro-batch-size 2 --fp16 --initial-loss-scale 1024", *FP16),
    (2, "--zero-stage 3 --micro-batch-size 2 --fp16 --initial-loss-scale 1024", *FP16),
    # the loss scale doubles on the way; the step at which it does is like any other
    (2, "--zero-stage 0 --micro-batch-size 2 --fp16 --initial-loss-scale 1024 --loss-scale-window 1", *FP16),
    (2, "--zero-stage 2 --micro-batch-size 2 --fp16 --initial-loss-scale 1024 --loss-scale-window 1", *FP16),
    (2, "--zero-stage 3 --micro-batch-size 2 --fp16 --initial-loss-scale 1024 --loss-scale-window 1", *FP16),
]


@pytest.mark.parametrize(
    ("ranks", "flags", "of_losses", "of_weights"), ROWS, ids=[f"{row[0]} ranks {row[1]}" for row in ROWS]
)
def test_training_equals_one_process(
    one_process: Trained, ranks: int, flags: str, of_losses: float, of_weights: float
) -> None:
    found = run_on_ranks(ranks, trained, flags)[0]
    assert found.losses == pytest.approx(one_process.losses, rel=of_losses)
    assert found.norms == pytest.approx(one_process.norms, rel=of_losses)
    assert distance(found.weights, one_process.weights) < of_weights


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative L2 distance of all weights laid end to end."""
    assert found.keys() == expected.keys()
    one, other = (torch.cat([weights[name] for name in expected]).double() for weights in (found, expected))
    return float((one - other).norm() / other.norm())


def test_the_recipe_clips_and_moves_the_weights(one_process: Trained) -> None:
    assert max(one_process.norms) > 0.5, "gradients must be large enough to be clipped"
    start = run_on_ranks(1, initial_weights)[0]
    assert distance(one_process.weights, start) > 0.1, "five steps must move the weights far beyond the tolerances"


def initial_weights() -> dict[str, torch.Tensor]:
    """Weights before the first step."""
    config = load_config([*RECIPE.split(), "--micro-batch-size", "8"])
    place = Place.of(Mesh.of(1), torch.device("cpu"))
    return whole_weights(build_model_and_engine(config, config.model, place))
