"""Under every ZeRO stage and with tensor parallelism recomputation gives the same bits as none: losses, gradient norms
and weights."""

import pytest
import torch
import torch.distributed as dist

from megalm.assembly import build_model_and_engine
from megalm.config.merging.load import load_config
from megalm.distributed.context import RankContext
from megalm.distributed.mesh import Mesh
from megalm.testing.batches import batch_of
from megalm.testing.spawner import run_on_ranks

STEPS, SEQ, VOCAB = 2, 16, 61
RECIPE = (
    "--num-layers 3 --hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --ffn-hidden-size 64 --swiglu "
    f"--position-embedding-type rope --normalization RMSNorm --vocab-size {VOCAB} --make-vocab-size-divisible-by 8 "
    f"--seq-length {SEQ} --micro-batch-size 2 --gradient-accumulation-steps 2 --train-iters {STEPS} --lr 0.01 "
    "--mock-data --eval-iters 0 --attention-dropout 0.1 --hidden-dropout 0.1"
)
MODES = (
    "",
    "--recompute-granularity full",
    "--recompute-granularity full --recompute-num-layers 2",
    "--recompute-granularity full --recompute-method block",
    "--recompute-activations",
)
ALWAYS_PARTITIONED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def trained(flags: str, mode: str) -> tuple[list[float], torch.Tensor]:
    """Losses and gradient norms of every step, and this rank's part of the weights."""
    config = load_config([*RECIPE.split(), *flags.split(), *mode.split()])
    if config.engine.zero_stage == 3:  # no weight stays gathered, not even the small ones of norms
        engine_config = config.engine.model_copy(update={"deepspeed_config": ALWAYS_PARTITIONED})
        config = config.model_copy(update={"engine": engine_config})
    context = RankContext.of(Mesh.of_config(config.parallel, dist.get_world_size()), torch.device("cpu"))
    engine, rank = build_model_and_engine(config, config.model, context), context.groups.data.rank
    generator = torch.Generator().manual_seed(rank)
    numbers = []
    for step in range(STEPS):
        parts = []
        for number in range(2):
            tokens = torch.randint(0, VOCAB, (2, SEQ + 1), generator=generator)
            parts.append(batch_of(tokens[:, :-1], tokens[:, 1:], seed=100 * step + 50 * number + rank))
        result = engine.train_step(parts, 0.01)
        numbers += [result.loss, result.grad_norm]
    return numbers, torch.cat([piece.weight.flatten() for piece in engine.state_slices()])


def differing_modes(flags: str) -> list[str]:
    numbers, weights = trained(flags, MODES[0])
    differing = []
    for mode in MODES[1:]:
        found, found_weights = trained(flags, mode)
        if found != numbers or not torch.equal(found_weights, weights):
            differing.append(mode)
    return differing


@pytest.mark.parametrize(
    "flags",
    [
        "--tensor-model-parallel-size 2 --sequence-parallel --zero-stage 2",
        *(
            pytest.param(flags, marks=pytest.mark.long)
            for flags in (
                "--pipeline-model-parallel-size 2 --pipeline-schedule zbv --num-layers 4",
                "--zero-stage 3",
                "--zero-stage 0",
                "--zero-stage 1 --bf16",
                "--zero-stage 2",
                "--tensor-model-parallel-size 2",
                "--pipeline-model-parallel-size 2 --pipeline-layout 2,1 --zero-stage 2",
            )
        ),
    ],
)
def test_every_mode_gives_the_same_bits(flags: str) -> None:
    assert run_on_ranks(2, differing_modes, flags) == [[], []]
