"""Under 16 bits the gradients of micro-batches are summed in fp32: bf16 loses what is small beside the sum."""

import pytest
import torch
import torch.distributed as dist
from layouts import CI, LLAMA, SEQ, VOCAB, Row

from megalm.assembly import build_model_and_engine
from megalm.config.merging.load import load_config
from megalm.distributed.context import RankContext
from megalm.distributed.mesh import Mesh
from megalm.testing.batches import batch_of
from megalm.testing.spawner import run_on_ranks

SMALL = 2**-9
"""1 + SMALL is 1 in bf16."""
MICRO_BATCHES = 12
RUN = (
    f"--num-layers 4 --hidden-size 32 --vocab-size {VOCAB} --seq-length {SEQ} --micro-batch-size 1 --lr 0.01 "
    f"--gradient-accumulation-steps {MICRO_BATCHES} --train-iters 2 --mock-data --eval-iters 0 {LLAMA} "
)
ROWS = [
    Row(2, "llama", "zero1 bf16", CI),
    Row(2, "llama", "zero3 bf16"),
    Row(2, "llama", "pp2 zbv zero0 bf16", CI),
    Row(4, "llama", "pp2 1f1b zero2 bf16"),
    Row(2, "llama", "zero0 bf16"),
    Row(2, "llama", "zero2 bf16", CI),
    Row(2, "llama", "tp2 zero0 bf16"),
    Row(2, "llama", "pp2 interleaved-zero-bubble zero1 bf16"),
    Row(4, "llama", "pp2 gpipe zero3 bf16"),
]


def norms(flags: str) -> tuple[float, float]:
    """Gradient norm of one micro-batch, and of the same one followed by many that weigh `SMALL` of it."""
    config = load_config((RUN + flags).split())
    context = RankContext.of(Mesh.of_config(config.parallel, dist.get_world_size()), torch.device("cpu"))
    engine = build_model_and_engine(config, config.model, context)
    tokens = torch.randint(0, VOCAB, (1, SEQ + 1), generator=torch.Generator().manual_seed(5))
    found = []
    for weight in (0.0, SMALL):
        masks = [torch.ones(1, SEQ)] + [torch.full((1, SEQ), weight)] * (MICRO_BATCHES - 1)
        batches = [batch_of(tokens[:, :-1], tokens[:, 1:], loss_mask=mask) for mask in masks]
        found.append(engine.train_step(batches, 0.0).grad_norm)
    return found[0], found[1]


def lost(ranks: int, flags: str) -> float:
    """The share of the gradient that the sum of micro-batches has lost: the loss is per token, so nothing should be."""
    one, summed = run_on_ranks(ranks, norms, flags)[0]
    return 1 - summed / one


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_nothing_is_lost_in_the_sum(row: Row) -> None:
    assert lost(row.ranks, row.flags) == pytest.approx(0.0, abs=0.005)


def test_sums_in_the_models_own_type_lose_the_small_ones() -> None:
    flags = "--zero-stage 0 --bf16 --grad-accum-dtype model"
    assert lost(2, flags) == pytest.approx(1 - 1 / (1 + (MICRO_BATCHES - 1) * SMALL), rel=0.2)
