"""A gradient that is not finite on one rank only: all ranks skip the step, keep their state and train on together."""

import math

import pytest
import torch
import torch.distributed as dist
from layouts import CI, MODELS, RUN, Row
from test_parity import global_batch

from megalm.assembly import build_model_and_engine
from megalm.config.merging.load import load_config
from megalm.config.rules.layout import check_layout
from megalm.data.batch import Batch
from megalm.distributed.context import RankContext
from megalm.distributed.mesh import Mesh
from megalm.testing.spawner import run_on_ranks

ROWS = [
    (Row(2, "deep llama", "tp2 zero0", CI), math.nan),
    (Row(2, "deep llama", "tp2 sp zero1", CI), math.inf),
    (Row(2, "deep llama", "tp2 zero3"), math.nan),
    (Row(2, "deep llama", "pp2 1f1b zero0"), math.inf),
    (Row(2, "deep llama", "pp2 1f1b zero1 bf16"), math.nan),
    (Row(2, "deep llama", "pp2 1f1b zero2", CI), math.nan),
    (Row(2, "deep llama", "pp2 interleaved-1f1b zero3"), math.inf),
    (Row(4, "deep llama", "tp2 pp2 gpipe zero1", CI), math.inf),
]


def skipped_steps(flags: str, bad: float) -> tuple[list[bool], list[bool], list[float]]:
    """For a good step, one with a `bad` gradient on the last rank, and a good one: was it skipped, did it leave this
    rank's weights as they were, its norm."""
    config = load_config(flags.split())
    context = RankContext.of(Mesh.of_config(config.parallel, dist.get_world_size()), torch.device("cpu"))
    dp, micro = check_layout(config, dist.get_world_size()), config.batch.micro_size
    engine = build_model_and_engine(config, config.model, context)
    parameter = next(p for p, name in engine.names.items() if name.endswith("mlp.w_down.weight"))
    generator, firsts = (
        torch.Generator().manual_seed(7),
        range(0, config.batch.accumulation(dp) * micro * dp, micro * dp),
    )
    skipped, kept, norms = [], [], []
    for step in range(3):
        batch = global_batch(config, generator)
        rows = [
            slice(first + context.groups.data.rank * micro, first + (context.groups.data.rank + 1) * micro)
            for first in firsts
        ]
        parts = [Batch(tensors={name: array[part] for name, array in batch.items()}) for part in rows]
        before = [piece.weight.clone() for piece in engine.state_slices()]
        poisoned = step == 1 and context.rank == dist.get_world_size() - 1
        hook = parameter.register_hook(lambda gradient: torch.full_like(gradient, bad)) if poisoned else None
        result = engine.train_step(parts, 0.01)
        if hook is not None:
            hook.remove()
        skipped.append(result.skipped)
        norms.append(result.grad_norm)
        after = [piece.weight for piece in engine.state_slices()]
        kept.append(all(torch.equal(old, new) for old, new in zip(before, after, strict=True)))
    return skipped, kept, norms


@pytest.mark.parametrize(("row", "bad"), ROWS, ids=str)
def test_all_ranks_skip_a_step_that_one_cannot_take(row: Row, bad: float) -> None:
    found = run_on_ranks(row.ranks, skipped_steps, f"{RUN} {MODELS[row.model]} {row.flags}", bad)
    for skipped, kept, norms in found:
        assert skipped == [False, True, False]
        assert kept == [False, True, False]
        assert not math.isfinite(norms[1])
        assert all(math.isfinite(norm) for norm in (norms[0], norms[2]))
